"""What computes the operations of a training pass: one record of functions, and the ways to fill it.

    TORCH        torch's own operations, with gradients written by hand (`linear.py`, `attention.py`, `head.py`): every
                 device and dtype
    OURS         kernels for a CPU in bfloat16 (`cpu.py`); what they do not serve is left to TORCH
    compiled()   norms, gates and rotary embeddings by torch.compile, the rest by TORCH

`train.kernels` pins one of them. Under `auto` each class of calls goes to the fastest (`autotune.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from graftlm.errors import TrainingError
from graftlm.kernels import cpu, linear
from graftlm.kernels.attention import AttentionRule, tiled_attention
from graftlm.kernels.head import linear_log_probs

Kernels = Literal["auto", "ours", "torch", "compiled"]


@cache
@torch.no_grad()
def rotates_halves(function: Callable[..., Any]) -> bool:
    """Whether a modeling file's rotary embedding is `linear.by_halves`, found by its results: other models rotate
    neighboring dimensions, or only a part of each head."""
    q, k, cos, sin = (probe(n, 8, torch.zeros(())).view(1, -1, 3, 8) for n in (12, 6, 3, 6))
    cos, sin = cos[0], sin[0, 1:]
    try:
        found, reference = function(q, k, cos, sin), linear.by_halves(q, k, cos, sin)
    except (TypeError, RuntimeError, ValueError):
        return False
    if not all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, reference, strict=True)):
        return False
    try:
        function(q, k, cos[..., :4], sin[..., :4])
    except RuntimeError:
        return list(signature(function).parameters) == list(signature(linear.by_halves).parameters)
    return False


def probe(rows: int, d: int, like: Tensor) -> Tensor:
    """Numbers between -1 and 1 that no two rows share [rows, d], in the dtype and on the device of `like`."""
    return torch.linspace(-1, 1, rows * d, device=like.device).mul(40).sin().view(rows, d).to(like.dtype)


@dataclass(frozen=True)
class Backend:
    """A function for every operation. `linear.py`, `attention.py` and `head.py` say what each computes."""

    low_rank_linear: Callable[..., Tensor] = linear.low_rank_linear
    """A frozen linear layer with low-rank factors on it: (x, W, b, A, B, gain) -> y."""
    attention: Callable[[Tensor, Tensor, Tensor, AttentionRule], Tensor] = tiled_attention
    """Attention inside the segments of a pack: (q, k, v, rule) -> out."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = linear.rms_norm
    """(x, gain, eps) -> y"""
    silu_gate: Callable[[Tensor, Tensor], Tensor] = linear.silu_gate
    """(gate, up) -> silu(gate) * up"""
    rotary: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    """The rotary embedding of a modeling file -> what takes its place."""
    head: Callable[..., Tensor] = linear_log_probs
    """The frozen output head and the log-probabilities: (hidden, W, b, targets, softcap) -> log p(targets)."""


TORCH = Backend()

OURS = Backend(
    low_rank_linear=cpu.low_rank_linear,
    attention=cpu.attention,
    rms_norm=cpu.rms_norm,
    silu_gate=cpu.silu_gate,
    rotary=lambda function: cpu.rotary if rotates_halves(function) else function,
)


@cache
def compiled() -> Backend:
    """Compiled from the plain equations: fused, they need neither pieces nor a backward pass by hand."""
    return replace(
        TORCH,
        rms_norm=_compile(
            lambda x, gain, eps: torch.nn.functional.rms_norm(x.float(), gain.shape, gain.float(), eps).to(x.dtype)
        ),
        silu_gate=_compile(lambda gate, up: torch.nn.functional.silu(gate) * up),
        rotary=lambda function: _compile(linear.by_halves if rotates_halves(function) else function),
    )


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)  # packs differ in length: one kernel for all of them


def pinned(kernels_: Literal["ours", "torch", "compiled"], device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of this name for a model on `device` in `dtype`; TrainingError where it cannot compute there."""
    if kernels_ == "torch":
        return TORCH
    if kernels_ == "compiled":
        check_compiler(device)
        return compiled()
    if reason := cpu.unavailable(device, dtype):
        raise TrainingError(
            f"train.kernels: ours: {reason}. Set train.kernels: auto to use the fastest of what works here",
            code="kernels-unavailable",
        )
    return OURS


def check_compiler(device: torch.device) -> None:
    """Raise TrainingError where torch.compile has no compiler to call: on a CPU it writes C++."""
    if device.type == "cpu" and cpu.compiler() is None:
        raise TrainingError(
            "train.kernels: compiled: torch.compile writes C++ on a CPU, and there is no compiler here (no g++, "
            "clang++ or $CXX). Install one (apt-get install g++) or set train.kernels: auto",
            code="no-compiler",
        )
