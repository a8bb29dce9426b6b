"""Products with a weight whose memory is laid out once, for batches of few rows on a CPU.

    y = x W^T + b        x [.., d_in], W [d_out, d_in], b [d_out]

A plain product reads W as it lies, row by row, or copies it into blocks at every call. Generation multiplies few rows
with the same W thousands of times: there the blocks are made once. This takes the memory of W once more.

`cpu.cpp` multiplies panels of 48 rows of W. oneDNN, with a layout of its own, serves where that does not: on processors
without vectors of 64 bytes, and in bfloat16 on those with tiles (AMX).
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.kernels import cpu

ROWS = 16
"""The rows that oneDNN chooses the layout for. It serves any other number too."""

PANEL = 48
"""Rows of W in a panel."""

DTYPES = (torch.float32, torch.bfloat16)


class _Layout(Protocol):
    weight: Tensor

    def product(self, x: Tensor, b: Tensor | None, addend: Tensor | None) -> Tensor:
        """x W^T + b + added, rounded once."""
        ...


class _Panels:
    """[panels, d_in, PANEL], in bfloat16 [panels, d_in / 2, PANEL, 2]; zeros behind the last row of W."""

    def __init__(self, weight: Tensor) -> None:
        (self.d_out, self.d_in), pair = weight.shape, _pair(weight.dtype)
        padded = F.pad(weight, (0, 0, 0, -self.d_out % PANEL))
        self.weight = padded.view(-1, PANEL, self.d_in // pair, pair).transpose(1, 2).contiguous()
        self.function = _function("panels", weight.dtype)

    def product(self, x: Tensor, b: Tensor | None, addend: Tensor | None) -> Tensor:
        if x.shape[-1] != self.d_in or x.dtype != self.weight.dtype:  # the kernel would read what is not there
            raise RuntimeError(
                f"x {list(x.shape)} in {x.dtype}, and the weight is [{self.d_out}, {self.d_in}] in {self.weight.dtype}"
            )
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.d_out)
        if addend is not None and addend.shape != y.shape:
            addend = addend.expand(y.shape) if addend.numel() != y.numel() else addend.view(y.shape)
        # The list has a name: its tensors must live until the kernel ends.
        addends = [None if t is None else t.to(x.dtype).contiguous() for t in (b, addend)]
        pointers = [None if t is None else t.data_ptr() for t in (x, self.weight, *addends, y)]
        self.function(*pointers, x.numel() // self.d_in, self.d_in, self.d_out, torch.get_num_threads())
        return y


class _OneDNN:
    def __init__(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def product(self, x: Tensor, b: Tensor | None, addend: Tensor | None) -> Tensor:
        if addend is None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, b, "none", [], "")
        else:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, addend, self.weight, b, "add")
        return y


class PrepackedProduct:
    """The product with one weight, as it was when this was made."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        W = weight.detach().contiguous()
        self.layout: _Layout = _Panels(W) if _in_panels(W) else _OneDNN(W)
        self.bias = None if bias is None else bias.detach().contiguous()
        self.source, self.version = weight, weight._version

    @property
    def is_stale(self) -> bool:
        """Whether somebody changed the weight in place since then."""
        return self.source._version != self.version

    def __call__(self, x: Tensor) -> Tensor:
        return self.layout.product(x, self.bias, None)

    def plus(self, x: Tensor, addend: Tensor) -> Tensor:
        """The product plus `addend` [.., d_out]; in half precision the sum is rounded and not its parts."""
        return self.layout.product(x, self.bias, addend)

    def low_rank(self, x: Tensor, W: Any, b: Tensor | None, A: Tensor, B: Tensor, gain: Tensor | None = None) -> Tensor:
        """`linear.low_rank_linear` with this weight for W. In half precision, too, the sum is rounded and not its
        parts. The small products run in float32: oneDNN's calls cost a quarter."""
        addend = ((x.float() @ A.T) @ B.T).to(x.dtype)
        z = self.layout.product(x, b if gain is None else None, addend)
        if gain is None:
            return z
        y = torch.addcmul(z, z, (gain - 1).to(x.dtype))
        return y if b is None else y + b


def packed_bytes(weight: Tensor) -> int:
    """Bytes that the layout of a weight takes; the weight may be on the meta device."""
    rows = weight.shape[0]
    return (rows + (-rows % PANEL if _in_panels(weight) else 0)) * weight.shape[1] * weight.element_size()


def _in_panels(weight: Tensor) -> bool:
    return weight.shape[1] % _pair(weight.dtype) == 0 and _panels_serve(weight.dtype)


@cache
def _panels_serve(dtype: torch.dtype) -> bool:
    if sys.platform != "linux" or not cpu.library_digest():
        return False
    return bool(_function("panels_serve", dtype)())


def _function(name: str, dtype: torch.dtype) -> Callable[..., int | None]:
    found: Callable[..., int | None] = getattr(cpu.library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    return found


def _pair(dtype: torch.dtype) -> int:
    """Numbers that the kernel multiplies together."""
    return 2 if dtype == torch.bfloat16 else 1


def can_prepack(layer: Any) -> bool:
    """Whether `PrepackedProduct` computes what this layer computes: a plain nn.Linear on a CPU, its dtype one that
    oneDNN has, and torch built with oneDNN."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or weight.numel() == 0:
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
