"""The kinds of frozen layer that a delta can sit on, each as one view: read W and b, apply others in their place."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class LinearBase:
    """A view of nn.Linear: W [d_out, d_in]."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.d_out, self.d_in = self.stored_weight.shape

    @property
    def stored_weight(self) -> Tensor:
        """W [d_out, d_in] in the dtype that it is stored in; the same memory, not a copy."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def stored_bias(self) -> Tensor | None:
        bias = self.layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def weight(self) -> Tensor:
        return self.stored_weight.detach().float()

    @property
    def bias(self) -> Tensor | None:
        return None if self.stored_bias is None else self.stored_bias.detach().float()

    def store(self, W: Tensor) -> Tensor:
        """W [d_out, d_in] laid out as this kind of layer keeps it in its state dict."""
        return W

    def __call__(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        assert isinstance(y, Tensor)
        return y

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))

    def take(self, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)


class Conv1DBase(LinearBase):
    """A view of GPT-2's Conv1D, which keeps its weight transposed: [d_in, d_out]."""

    @property
    def stored_weight(self) -> Tensor:
        return super().stored_weight.T

    def store(self, W: Tensor) -> Tensor:
        return W.T


KINDS: dict[type[nn.Module], Callable[[nn.Module], LinearBase]] = {nn.Linear: LinearBase, Conv1D: Conv1DBase}


def view(layer: nn.Module) -> LinearBase | None:
    """The view of a layer, or None for a kind that no delta can sit on. Subclasses may compute otherwise: not taken."""
    make = KINDS.get(type(layer))
    return make(layer) if make else None
