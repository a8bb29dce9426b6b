"""The kinds of frozen layer that a delta can sit on, each as one view: read W and b, apply others in their place.

All that the plumbing and the methods know of a frozen layer is the interface `Base` of `graftlm/deltas/base.py`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftlm.errors import TargetError
from graftlm.kernels.linear import Frozen, low_rank_linear
from graftlm.model.quantize import QuantizedLinear


class LinearBase:
    """A view of nn.Linear: W [d_out, d_in]."""

    kind = "linear"
    transposed = False
    """Whether a state dict holds the weight as [d_in, d_out]."""
    fused = staticmethod(low_rank_linear)
    """What computes the layer with factors on it. A view may be given another that computes the same."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.d_out, self.d_in = self.stored_weight.shape
        self._row_squares: tuple[tuple[int, int], Tensor] | None = None

    @property
    def stored_weight(self) -> Tensor:
        """W [d_out, d_in] in the dtype that it is stored in; the same memory, not a copy."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def stored_bias(self) -> Tensor | None:
        bias = getattr(self.layer, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def dtype(self) -> torch.dtype:
        """What the layer's products run in."""
        return self.stored_weight.dtype

    @property
    def frozen(self) -> Frozen:
        """W as the fused operations take it."""
        return self.stored_weight

    @property
    def weight(self) -> Tensor:
        return self.stored_weight.detach().float()

    @property
    def bias(self) -> Tensor | None:
        return None if self.stored_bias is None else self.stored_bias.detach().float()

    def original(self) -> Tensor:
        """W before it was quantized, float32 [d_out, d_in]; TargetError where it was not, or cannot be read again."""
        raise TargetError(
            "this layer is not quantized, so nothing was lost: load the base with quantization nf4, int4 or int8",
            code="layer-not-quantized",
        )

    def store(self, W: Tensor) -> Tensor:
        """W [d_out, d_in] laid out as this kind of layer keeps it in its state dict."""
        return W.T if self.transposed else W

    def __call__(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        assert isinstance(y, Tensor)
        return y

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))

    def take(self, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, gain: Tensor | None = None) -> Tensor:
        return self.fused(x, self.frozen, self.stored_bias, A, B, gain)

    def plus(self, x: Tensor, addend: Tensor) -> Tensor:
        """The layer's output for x [.., d_in] plus `addend` [.., d_out], which may be overwritten. In half precision
        the sum is rounded and not its parts (`linear.py`)."""
        if x.dtype not in (torch.bfloat16, torch.float16):
            return self(x).add_(addend)
        W, b = self.frozen, self.stored_bias
        W = W if isinstance(W, Tensor) else W(x.dtype)
        addend = (addend if b is None else (addend.float() + b).to(x.dtype)).flatten(0, -2)
        return torch.addmm(addend, x.flatten(0, -2), W.T).view(*x.shape[:-1], -1)

    def product(self, A: Tensor) -> Tensor:
        W = self.stored_weight.detach()
        return (W @ A.to(W.dtype).T).float()

    @torch.no_grad()
    def row_norms(self, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
        squares = self._squares()
        if A is not None and B is not None:  # ||W||^2 + 2 <W, B A> + ||B A||^2, row by row
            squares = squares + 2 * (B * self.product(A)).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
        return squares.clamp_min(0).sqrt()

    def _squares(self) -> Tensor:
        """||W||^2 of each row, computed once."""
        numbers = self._numbers()
        version = (numbers.data_ptr(), numbers._version)  # of these very numbers: another base is summed again
        if self._row_squares is None or self._row_squares[0] != version:
            self._row_squares = version, self.weight.square().sum(1)
        return self._row_squares[1]

    def _numbers(self) -> Tensor:
        """The tensor in memory that W is read from."""
        return self.stored_weight


class Conv1DBase(LinearBase):
    """A view of GPT-2's Conv1D, which keeps its weight transposed: [d_in, d_out]."""

    transposed = True

    @property
    def stored_weight(self) -> Tensor:
        return super().stored_weight.T


class QuantizedBase(LinearBase):
    """A view of quantized weights: W is made of them wherever it is asked for, and never kept."""

    def __init__(self, layer: QuantizedLinear) -> None:
        self.layer: QuantizedLinear = layer
        self.d_out, self.d_in = layer.shape
        self.transposed = layer.transposed
        self._row_squares = None

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def stored_weight(self) -> Tensor:
        return self.layer.dequantized(self.layer.dtype)

    @property
    def frozen(self) -> Frozen:
        return self.layer.dequantized

    @property
    def weight(self) -> Tensor:
        return self.layer.dequantized()

    def original(self) -> Tensor:
        if self.layer.original is None:
            raise TargetError(
                "the base was not loaded from a folder, so its weights before quantizing cannot be read",
                code="original-weight-missing",
            )
        return self.layer.original().float()

    def _numbers(self) -> Tensor:
        codes = self.layer.codes
        assert isinstance(codes, Tensor)
        return codes


class EmbeddingBase(Conv1DBase):
    """A view of nn.Embedding as the linear layer that it is on one-hot x: W [d_model, vocabulary], x [..] of ids."""

    kind = "embedding"

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        rows = F.embedding(x, W.T)
        return (rows if b is None else rows + b).to(self.stored_weight.dtype)

    def take(self, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.T)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, gain: Tensor | None = None) -> Tensor:
        y = self(x)
        z = y.float() + self.take(x, A) @ B.T
        return (z if gain is None else gain * z).to(y.dtype)


class ScaledEmbeddingBase(EmbeddingBase):
    """A view of an embedding that multiplies what it looks up (Gemma and BART): W is what it stores."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        scale: Any = layer.embed_scale
        self.scale = 1.0 if isinstance(scale, Tensor) and scale.is_meta else float(scale)

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        y = super().apply(x, W, None) * self.scale
        return (y if b is None else y + b).to(self.stored_weight.dtype)

    def take(self, x: Tensor, A: Tensor) -> Tensor:
        return super().take(x, A) * self.scale


class NormBase(LinearBase):
    """A view of a norm (LayerNorm, any RMSNorm): W and b are its gain and bias [d], as the layer stores them."""

    kind = "norm"

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        (self.d_in,) = (self.d_out,) = self.stored_weight.shape

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        here = {"weight": W} if b is None or self.stored_bias is None else {"weight": W, "bias": b}
        y: Tensor = torch.func.functional_call(self.layer, here, (x.float(),))
        return (y if b is None or self.stored_bias is not None else y + b).to(x.dtype)


KINDS: dict[type[nn.Module], Callable[[Any], LinearBase]] = {
    nn.Linear: LinearBase,
    Conv1D: Conv1DBase,
    QuantizedLinear: QuantizedBase,
    nn.Embedding: EmbeddingBase,
    nn.LayerNorm: NormBase,
}


def view(layer: nn.Module) -> LinearBase | None:
    """The view of a layer, or None for a kind that no delta can sit on, and for a layer without inputs or outputs.

    A subclass of a linear layer, and one whose `forward` somebody replaced (accelerate's hooks do), is asked what it
    computes: it is taken where that is x W^T + b. An RMS norm has a class of its own in each architecture: it is known
    by its name and its single weight [d].
    """
    make = KINDS.get(type(layer))
    if isinstance(layer, nn.Linear | Conv1D) and (make is None or "forward" in vars(layer)):
        make = (LinearBase if isinstance(layer, nn.Linear) else Conv1DBase) if _is_linear(layer) else None
    elif make is None and type(layer).__name__.endswith("RMSNorm") and _has_gain(layer):
        make = NormBase
    if make is None and isinstance(layer, nn.Embedding) and _is_scaled(layer):
        make = ScaledEmbeddingBase
    if make is None:
        return None
    base = make(layer)
    return base if base.d_in and base.d_out else None


ASKED = "graft_is_linear"


@torch.no_grad()
def _is_linear(layer: Any) -> bool:
    """Whether a layer's forward is x W^T + b up to rounding, by two rows; the answer is kept with the layer."""
    forward = layer.forward if "forward" in vars(layer) else type(layer)
    answer = vars(layer).get(ASKED)
    if answer is None or answer[0] is not forward:
        answer = vars(layer)[ASKED] = forward, _computes_linear(layer)
    return bool(answer[1])


def _computes_linear(layer: Any) -> bool:
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    weight, bias = tensors.pop("weight", None), tensors.pop("bias", None)
    if tensors or weight is None or weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        return False
    forward = layer.forward
    if weight.is_meta:  # the base without its weights (`sketch.py`): by numbers in their place
        values = {name: _numbers(t.shape, t.dtype) for name, t in layer.named_parameters()}
        weight, bias = values["weight"], values.get("bias")
        forward = partial(torch.func.functional_call, layer, values)
    W = weight.T if isinstance(layer, Conv1D) else weight
    x = _numbers((2, W.shape[1]), W.dtype).to(W.device)
    reference = F.linear(x, W, bias)
    try:
        found = forward(x)
    except Exception:  # whatever it wants, it is no row of numbers
        return False
    if not isinstance(found, Tensor) or found.shape != reference.shape:
        return False
    error, size = (found.float() - reference.float()).abs().max(), reference.float().abs().max()
    return bool(error <= 4 * torch.finfo(W.dtype).eps * size)


def _numbers(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Numbers between -1 and 1, no two of a row the same."""
    count = math.prod(shape)
    return torch.linspace(-1, 1, count).mul(40).sin().view(*shape).to(dtype)


@torch.no_grad()
def _is_scaled(layer: nn.Embedding) -> bool:
    """Whether a subclass of nn.Embedding looks rows up and multiplies them with its `embed_scale`, and no more."""
    scale, rows = getattr(layer, "embed_scale", None), layer.weight[:4]
    if scale is None or rows.is_meta:  # without its weights (`sketch.py`) it can only be known by its name
        return scale is not None and type(layer).__name__.endswith("ScaledWordEmbedding")
    found = layer(torch.arange(len(rows), device=rows.device))
    return torch.allclose(found.float(), rows.float() * float(scale), rtol=4 * torch.finfo(rows.dtype).eps)


def _has_gain(layer: nn.Module) -> bool:
    return {name: p.dim() for name, p in layer.named_parameters()} == {"weight": 1}


class Residual:
    """A frozen layer less a fixed low-rank part: W - B0 A0, for deltas that start from a part of W."""

    def __init__(self, inner: LinearBase, A0: Tensor, B0: Tensor) -> None:
        self.inner, self.A0, self.B0 = inner, A0, B0

    @property
    def weight(self) -> Tensor:
        return self.inner.weight - self.B0 @ self.A0

    @property
    def bias(self) -> Tensor | None:
        return self.inner.bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner.low_rank(x, self.A0, -self.B0)

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return self.inner.apply(x, W, b)

    def take(self, x: Tensor, A: Tensor) -> Tensor:
        return self.inner.take(x, A)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, gain: Tensor | None = None) -> Tensor:
        return self.inner.low_rank(x, torch.cat([A, self.A0]), torch.cat([B, -self.B0], dim=1), gain)

    def product(self, A: Tensor) -> Tensor:
        return self.inner.product(A) - self.B0 @ (self.A0 @ A.T)

    def row_norms(self, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
        if A is None or B is None:
            return self.inner.row_norms(self.A0, -self.B0)
        return self.inner.row_norms(torch.cat([A, self.A0]), torch.cat([B, -self.B0], dim=1))
