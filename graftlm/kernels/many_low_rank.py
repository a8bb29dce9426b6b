"""Low-rank changes of one layer by many adapters in one pass: each token has those of its span.

    y[t] = sum over the changes of t's span of  share B (A x[t])        A [r, d_in], B [d_out, r]

A change is read where it lies, if B lies by columns (`by_columns`): nothing is gathered, padded or widened for a batch.
Where `cpu.cpp` does not serve, the
factors are stacked once for a sequence of spans (Punica's and S-LoRA's gathered products, Chen et al. 2023, Sheng et
al. 2023), and every pass over the same sequence takes the stack.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graftlm.kernels import cpu

LONG = 128
"""A span of more tokens (a prompt) is two ordinary products."""

AT_ONCE = 32
"""Tokens of a span that the kernel takes together."""

_CHANGE = np.dtype([("A", "i8"), ("BT", "i8"), ("r", "i8"), ("narrow", "i8"), ("share", "f8")])
_NARROW = {torch.float32: 0, torch.bfloat16: 1}
_FUNCTIONS = {torch.float32: "many_low_rank_float32", torch.bfloat16: "many_low_rank_bfloat16"}


class Change(NamedTuple):
    """What is added to a layer: share * B A."""

    A: Tensor
    """[r, d_in]"""
    B: Tensor
    """[d_out, r]"""
    share: float = 1.0


class Changes(tuple[Change, ...]):
    """The changes of a span, with what the kernel reads of them: made once, for every pass that has such a span."""

    columns: list[Tensor]
    """The B by columns: they stay as long as their addresses are in `table`."""
    table: bytes
    by_kernel: bool
    """Whether the kernel can read all of them; else `table` is empty."""
    largest: int
    """Rank."""

    def __new__(cls, changes: Iterable[Change] = ()) -> "Changes":
        self = super().__new__(cls, changes)
        self.by_kernel = all(map(_kernel_reads, self))
        self.columns = [by_columns(change.B) for change in self] if self.by_kernel else []
        rows = [
            (change.A.data_ptr(), columns.data_ptr(), len(change.A), _NARROW[change.A.dtype], change.share)
            for change, columns in zip(self, self.columns, strict=False)  # none, where the kernel reads none
        ]
        self.table = np.array(rows, dtype=_CHANGE).tobytes()
        self.largest = max((len(change.A) for change in self), default=1)
        return self


class _Padded(NamedTuple):
    """The tokens of some spans as a matrix, a row a span."""

    tokens: Tensor
    """[spans, longest]: the token, and 0 behind the last one of a span."""
    places: Tensor
    """[tokens of these spans]: where they stand in that matrix, laid out flat."""
    where: Tensor
    """[tokens of these spans]: the tokens."""


@dataclass(eq=False)
class Bounds:
    """Where the spans of a pass lie: made once a pass, for all layers."""

    spans: Sequence[tuple[int, int]]
    """(start, stop) in tokens."""
    padded: dict[tuple[int, ...], _Padded] = field(default_factory=dict)
    some: "dict[tuple[int, ...], Bounds]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.long = [number for number, (start, stop) in enumerate(self.spans) if stop - start > LONG]
        runs = [
            (token, min(AT_ONCE, stop - token), number)
            for number, (start, stop) in enumerate(self.spans)
            if stop - start <= LONG
            for token in range(start, stop, AT_ONCE)
        ]
        self.runs = np.array(runs, dtype=np.int64).reshape(-1, 3)
        self.short_at, self.short_count = self.runs.ctypes.data, len(runs)

    def of(self, numbers: tuple[int, ...]) -> "Bounds":
        """Some of the spans, their tokens moved up to stand end to end."""
        if numbers not in self.some:
            spans, end = [], 0
            for number in numbers:
                start, stop = self.spans[number]
                spans.append((end, end := end + stop - start))
            self.some[numbers] = Bounds(spans)
        return self.some[numbers]

    def rows(self, numbers: tuple[int, ...], device: torch.device) -> _Padded:
        """The tokens of these spans, a row a span."""
        if numbers not in self.padded:
            longest = max(self.spans[number][1] - self.spans[number][0] for number in numbers)
            tokens, places, where = [], [], []
            for row, number in enumerate(numbers):
                here = list(range(*self.spans[number]))
                places += [row * longest + place for place in range(len(here))]
                where += here
                tokens.append(here + [0] * (longest - len(here)))
            self.padded[numbers] = _Padded(*(torch.tensor(each, device=device) for each in (tokens, places, where)))
        return self.padded[numbers]


class ManyLowRank:
    """The changes of a layer for a sequence of spans, as long as their tensors are not replaced."""

    def __init__(self, spans: Sequence[Changes], d_out: int) -> None:
        self.spans, self.d_out = spans, d_out
        self.stacked: dict[torch.dtype, tuple[tuple[int, ...], Tensor, Tensor]] = {}
        self.by_kernel = all(span.by_kernel for span in spans)
        self.changes = np.frombuffer(b"".join(span.table for span in spans), dtype=_CHANGE)
        self.begins = np.cumsum([0, *map(len, spans)], dtype=np.int64)
        self.largest = max((span.largest for span in spans), default=1)
        self.at = self.begins.ctypes.data, self.changes.ctypes.data

    def __call__(self, x: Tensor, bounds: Bounds) -> Tensor:
        """The sum of the changes [T, d_out] for x [T, d_in] of any float dtype, in that dtype; [1, T, d_out] for x
        [1, T, d_in]."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.d_out)
        if bounds.short_count:
            if self.by_kernel and serves(x):
                sizes = x.shape[-1], self.d_out, self.largest, torch.get_num_threads()
                _function(x.dtype)(x.data_ptr(), y.data_ptr(), bounds.short_at, bounds.short_count, *self.at, *sizes)
            else:
                self._by_stack(x.flatten(0, -2), y.view(-1, self.d_out), bounds)
        for number in bounds.long:
            start, stop = bounds.spans[number]
            self._by_products(x.flatten(0, -2)[start:stop], y.view(-1, self.d_out)[start:stop], self.spans[number])
        return y

    def _by_products(self, x: Tensor, y: Tensor, changes: Sequence[Change]) -> None:
        if not changes:
            y.zero_()
            return
        x = x.to(dtype := _computing(x))
        products = [_times(_times(x, c.A.to(dtype)), c.B.to(dtype), c.share) for c in changes]
        y.copy_(products[0] if len(products) == 1 else torch.stack(products).sum(0))

    def _by_stack(self, x: Tensor, y: Tensor, bounds: Bounds) -> None:
        long = set(bounds.long)
        for number, (start, stop) in enumerate(bounds.spans):
            if not self.spans[number] and number not in long:
                y[start:stop] = 0
        dtype = _computing(x)
        if not any(self.spans):
            return
        numbers, A, B = self._stack(dtype)
        rows = [row for row, number in enumerate(numbers) if number not in long]
        if not rows:
            return
        if len(rows) < len(numbers):  # in a pass with prompts: a copy, which the passes that follow do without
            numbers, A, B = tuple(numbers[row] for row in rows), A[rows], B[rows]
        padded = bounds.rows(numbers, x.device)
        change = x[padded.tokens].to(dtype) @ A @ B
        y[padded.where] = change.flatten(0, 1)[padded.places].to(y.dtype)

    def _stack(self, dtype: torch.dtype) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """(spans that have changes, their A^T [spans, d_in, R], their B^T [spans, R, d_out]), 0 behind the ranks."""
        if dtype not in self.stacked:
            numbers = tuple(number for number, span in enumerate(self.spans) if span)
            ranks = [sum(len(change.A) for change in self.spans[number]) for number in numbers]
            like = next(_flat(self.spans)).A
            A = like.new_zeros(len(numbers), like.shape[1], max(ranks), dtype=dtype)
            B = like.new_zeros(len(numbers), max(ranks), self.d_out, dtype=dtype)
            for row, number in enumerate(numbers):
                at = 0
                for change in self.spans[number]:
                    end = at + len(change.A)
                    A[row, :, at:end] = change.A.T
                    B[row, at:end] = change.share * change.B.T.to(dtype)
                    at = end
            self.stacked[dtype] = numbers, A, B
        return self.stacked[dtype]


def serves(x: Tensor) -> bool:
    """Whether the kernel computes changes of x."""
    return x.is_cpu and x.dtype in _FUNCTIONS and sys.platform == "linux" and bool(cpu.library_digest())


@cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    found: Callable[..., None] = getattr(cpu.library(), _FUNCTIONS[dtype])
    return found


def _kernel_reads(change: Change) -> bool:
    A, B = change.A, change.B
    return A.dtype in _NARROW and A.dtype == B.dtype and A.is_contiguous()


def by_columns(B: Tensor, scale: float = 1.0) -> Tensor:
    """scale B, its columns end to end in memory, as the kernel reads it without a copy."""
    if B.T.is_contiguous():
        return B if scale == 1 else scale * B
    if not (serves(B) and B.is_contiguous()):
        return (B if scale == 1 else scale * B).T.contiguous().T
    (d_out, r), narrow = B.shape, _NARROW[B.dtype]
    BT = B.new_empty(r, d_out)
    cpu.library().scaled_transpose(B.data_ptr(), narrow, d_out, r, scale, BT.data_ptr(), narrow)
    return BT.T


def _computing(x: Tensor) -> torch.dtype:
    """What products run in: on a processor float32 at least, on other devices as x."""
    return torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype


def _times(x: Tensor, M: Tensor, share: float = 1.0) -> Tensor:
    y = (M @ x.T).T  # the few rows of the small factor first: a quarter less time than x M^T
    return y if share == 1 else y.mul_(share)


def _flat(spans: Sequence[Sequence[Change]]) -> "chain[Change]":
    return chain.from_iterable(spans)
