"""Frozen weights in 8 and 4 bits: codecs in plain torch, and a linear layer that has only quantized weights.

    int8    per row: round(127 W / max|W|)                                                              8 + 32 / d_in
    nf4     16 quantiles of a normal distribution, blocks of 64, block constants in 8 bits again        4.127
            Dettmers et al. 2023, arXiv:2305.14314, section 3; the very integers of bitsandbytes
    int4    per group of 32 inputs of a row: W = scale (code - zero), zero a float                      5.5

The last column is bits a weight. A codec turns W [d_out, d_in] into a few tensors and these into W again; every product
is made of W in the dtype of x, which exists for that product only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.kernels.linear import frozen_linear

Tensors = Mapping[str, Tensor]


class Codec(ABC):
    """One quantization of W. Stateless: what it makes of W is in the tensors that `quantize` returns."""

    name: str

    @abstractmethod
    def quantize(self, W: Tensor) -> dict[str, Tensor]:
        """W [d_out, d_in] -> the tensors that stand for it."""

    @abstractmethod
    def dequantize(self, tensors: Tensors, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The tensors -> W [d_out, d_in], computed in float32 and rounded once to `dtype`."""

    def bits(self, W: Tensor) -> float:
        """Bits a weight, all constants and padding counted."""
        return sum(8 * t.numel() * t.element_size() for t in self.quantize(W).values()) / W.numel()


# int8 -------------------------------------------------------------------------------------------------------------


class Int8(Codec):
    name = "int8"

    def quantize(self, W: Tensor) -> dict[str, Tensor]:
        scale = W.float().abs().amax(1).div_(127)
        codes = (W.float() / _not_zero(scale)[:, None]).round_().clamp_(-127, 127)
        return {"codes": codes.to(torch.int8), "scale": scale}

    def dequantize(self, tensors: Tensors, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return _scaled(tensors["codes"].float(), tensors["scale"], dtype)


# nf4 --------------------------------------------------------------------------------------------------------------

BLOCK = 64
"""Weights, along the rows laid end to end, that share a constant."""
CONSTANTS = 256
"""Block constants that share one of the second level."""


@cache
def normal_levels() -> Tensor:
    """The 16 levels of NF4, ascending, float32 in [-1, 1]: arXiv:2305.14314, section 3.

    Eight quantiles of the positive half of a normal distribution and seven of the negative one, each half evenly
    spaced in probability from 1 - delta to 1/2 with delta = (1/30 + 1/32) / 2, and an exact zero between them.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (levels / levels.max()).float()


@cache
def dynamic_levels() -> Tensor:
    """The 256 levels of the second level, ascending, float32: Dettmers 2015, arXiv:1511.04561, section 2.1.

    In the decade 10^(e-7) .. 10^(e-6), e = 0 .. 6, 2^e fractions of either sign, in the middle of even steps from a
    tenth of it; with 0 and 1.
    """
    found = [torch.tensor([0.0, 1.0])]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1)
        # 10^e is a Python number: rounded once, to float32, as bitsandbytes does
        middles = 10 ** (e - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [middles, -middles]
    return torch.cat(found).sort().values


class Nf4(Codec):
    name = "nf4"

    def quantize(self, W: Tensor) -> dict[str, Tensor]:
        blocks = _in_blocks(W.reshape(-1).float(), BLOCK)
        constants = blocks.abs().amax(1)
        mean = constants.mean()
        second = _in_blocks(constants - mean, CONSTANTS)
        scale = second.abs().amax(1)
        return {
            "codes": _packed(_nearest(blocks, constants, normal_levels())),
            "constants": _nearest(second, scale, dynamic_levels()).view(-1)[: len(constants)].to(torch.uint8),
            "scale": scale,
            "mean": mean,
        }

    def dequantize(self, tensors: Tensors, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        where = tensors["codes"].device
        constants = _in_blocks(dynamic_levels().to(where)[tensors["constants"].int()], CONSTANTS)
        constants = (constants * tensors["scale"][:, None] + tensors["mean"]).view(-1)[: len(tensors["constants"])]
        values = _unpacked(tensors["codes"], _pairs("nf4", where)).view(-1, BLOCK)
        return _scaled(values, constants, dtype).view(-1)[: shape[0] * shape[1]].view(shape)


# int4 in groups ---------------------------------------------------------------------------------------------------

GROUP = 32
"""Inputs of a row that share a scale and a zero: the group size of QA-LoRA (arXiv:2309.14717, section 4.1)."""


class Int4(Codec):
    """Asymmetric, by the least and the greatest weight of a group. The scale is bf16, codes are chosen for it."""

    name = "int4"

    def quantize(self, W: Tensor) -> dict[str, Tensor]:
        d_out, d_in = W.shape
        missing = -d_in % GROUP
        groups = torch.cat([W, W[:, -1:].expand(-1, missing)], dim=1).float().view(d_out, -1, GROUP)
        low, high = groups.aminmax(dim=2)
        step = (high - low) / 15
        step = torch.where(step > 0, step, high.abs())  # equal weights: code 0, and the zero says which
        scale = _not_zero(step.bfloat16())
        zero = -low / scale
        codes = (groups / scale[..., None] + zero[..., None]).round_().clamp_(0, 15)
        return {"codes": _packed(codes.to(torch.uint8)).view(d_out, -1), "scale": scale, "zero": zero}

    def dequantize(self, tensors: Tensors, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        values = _unpacked(tensors["codes"].view(-1), _pairs("int4", tensors["codes"].device)).view(-1, GROUP)
        values = values.sub_(tensors["zero"].view(-1, 1))
        return _scaled(values, tensors["scale"].float().view(-1), dtype).view(shape[0], -1)[:, : shape[1]].contiguous()


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Int8(), Nf4(), Int4())}


# What they share --------------------------------------------------------------------------------------------------


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1, scale)


def _in_blocks(flat: Tensor, size: int) -> Tensor:
    """[n] -> [n / size, size], filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _nearest(blocks: Tensor, constants: Tensor, levels: Tensor) -> Tensor:
    """The number of the nearest level of each element of blocks [n, size], divided by its block's constant [n]."""
    levels = levels.to(blocks.device)
    scaled = (blocks * (1 / constants.clamp_min(1e-38))[:, None]).clamp_(-1, 1)
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)


def _packed(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the upper half; the number of codes must be even."""
    first, second = codes.reshape(-1, 2).unbind(1)
    return (first << 4) | second


@cache
def _pairs(name: str, device: torch.device) -> Tensor:
    """What each byte stands for: [256] pairs of float32, each pair as one int64."""
    levels = normal_levels() if name == "nf4" else torch.arange(16.0)
    byte = torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1).view(torch.int64).view(-1).to(device)


def _unpacked(codes: Tensor, pairs: Tensor) -> Tensor:
    """Bytes [n / 2] -> float32 [n]. One look-up expands a byte: the fastest way of those in benchmarks/nf4."""
    return pairs.index_select(0, codes.to(torch.int32)).view(torch.float32)


def _scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values [n, size] times scale [n], rounded once to `dtype`; `values` is used up."""
    if dtype == torch.float32:
        return values.mul_(scale[:, None])
    return torch.mul(values, scale[:, None], out=torch.empty(values.shape, dtype=dtype, device=values.device))


# The layer --------------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """A frozen linear layer with quantized weights; it has buffers only, no parameter.

    `transposed`: it was a Conv1D, whose weight is [d_in, d_out] in a state dict. `original` reads W as it was, [d_out,
    d_in], from the base's files.
    """

    bias: Tensor | None

    def __init__(
        self,
        W: Tensor,
        bias: Tensor | None,
        codec: Codec,
        *,
        transposed: bool = False,
        original: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.original = original
        self.out_features, self.in_features = W.shape
        self.codec, self.dtype, self.transposed = codec, W.dtype, transposed
        for name, tensor in codec.quantize(W.detach()).items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def tensors(self) -> dict[str, Tensor]:
        """The codec's tensors, by name."""
        return {name: tensor for name, tensor in self.named_buffers() if name != "bias"}

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [d_out, d_in], made anew."""
        return self.codec.dequantize(self.tensors(), self.shape, dtype)

    @property
    def weight(self) -> Tensor:
        """W as the layer had it (a Conv1D's is transposed), in the dtype of its products, made anew: for model code
        that reads it."""
        W = self.dequantized(self.dtype)
        return W.T if self.transposed else W

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.dequantized, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Constants keep their dtype, whatever the model is cast to; what products run in follows the cast."""
        before = self.tensors()
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.codec.name}"
