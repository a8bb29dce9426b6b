"""Attention over the segments of a pack, tile by tile, with a backward pass written by hand.

It is tested against softmax(scale q k^T + mask) v, gradients included. T tokens of a pack, S keys; H query heads, G
key/value heads, L queries of a tile, D head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

QUERIES_AT_ONCE = 128
"""Queries of one product on a CPU. Less of it falls behind the causal mask than if a segment were one product."""

KEPT_KEYS = 256
"""Probabilities over so many keys are kept for the backward pass; those over more are computed again."""


class Tile(NamedTuple):
    """Queries a .. b of a pack, and the ranges of keys that they may see, in the order of their positions."""

    queries: slice
    keys: list[slice]

    @property
    def shape(self) -> tuple[int, int]:
        return self.queries.stop - self.queries.start, sum(k.stop - k.start for k in self.keys)


@dataclass
class SegmentLayout:
    """Where the segments of a packed row lie."""

    lengths: list[int]
    parents: list[int] | None = None
    """The segment that each one continues, -1 for none: it sees all those on the way there. None: no one continues."""
    masks: dict[tuple[int | None, ...], Tensor] = field(default_factory=dict)
    tiled: dict[tuple[int, int | None], list["Tile"]] = field(default_factory=dict)
    for_cpu_kernels: dict[int, Any] = field(default_factory=dict)
    """By `always`: the segments as `cpu.py` lays them out."""
    attend: "Callable[[Tensor, Tensor, Tensor, AttentionRule], Tensor] | None" = None
    """What computes attention over these segments; None: `tiled_attention`."""

    def tiles(self, always: int, at_once: int | None) -> list[Tile]:
        """The queries of each segment in equal parts of about `at_once`, with the keys of the row up to there.

        `always` keys that every query sees stand before those of the pack. Made once, used by every layer.
        """
        key = (always, at_once)
        if key not in self.tiled:
            self.tiled[key] = self._tiles(always, at_once)
        return self.tiled[key]

    def _tiles(self, always: int, at_once: int | None) -> list[Tile]:
        found: list[Tile] = []
        paths: list[list[slice]] = []
        end = 0
        for length, parent in zip(self.lengths, self.parents or [-1] * len(self.lengths), strict=True):
            start, end = end, end + length
            before = paths[parent] if parent >= 0 else [slice(0, always)] if always else []
            paths.append([*before, slice(always + start, always + end)])
            parts = max(1, round(length / (at_once or length)))
            ends = [start + length * (n + 1) // parts for n in range(parts)]
            for a, b in zip([start, *ends], ends, strict=False):
                found.append(Tile(slice(a, b), [*before, slice(always + start, always + b)]))
        return found

    def mask(self, tile: Tile, always: int, window: int | None, like: Tensor) -> Tensor:
        """0 for what is seen and -inf for the rest, [L, S]: the queries stand at the last L of the tile's S keys.

        The first `always` keys are seen from everywhere; of the others, those not later than the query and less than
        `window` positions before it. Keys lie in the order of their positions, so distances are differences of
        indices. Made once for each shape, used by every layer.
        """
        L, S = tile.shape
        key = (L, S, always, window)
        if key not in self.masks:
            distance = torch.arange(S - L, S, device=like.device)[:, None] - torch.arange(S, device=like.device)
            hidden = (distance < 0) | (distance >= (window or S))
            hidden[:, :always] = False
            seen = torch.zeros(L, S, dtype=like.dtype, device=like.device)
            self.masks[key] = seen.masked_fill_(hidden, float("-inf"))
        return self.masks[key]


LAYOUT: ContextVar[SegmentLayout | None] = ContextVar("graft_layout", default=None)
"""The layout of the pack that a model computes at present. No argument of the model: not every architecture hands one
on to its attention."""


@contextmanager
def use_layout(layout: SegmentLayout | None) -> Iterator[None]:
    """Inside, `segment_attention` attends by this layout. What runs later (recomputation) must enter it again."""
    token = LAYOUT.set(layout)
    try:
        yield
    finally:
        LAYOUT.reset(token)


@dataclass(frozen=True)
class AttentionRule:
    """The settings of a layer's attention: everything but its inputs."""

    layout: SegmentLayout
    scale: float
    window: int | None
    softcap: float | None
    always: int

    def mask(self, tile: Tile, like: Tensor) -> Tensor:
        window = self.window if self.window is not None and self.window < tile.shape[1] else None
        return self.layout.mask(tile, self.always, window, like)

    def probabilities(self, q_: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """softmax over S keys [G, H / G * L, S], and the tanh of soft-capped scores, for queries under each other."""
        L, S = mask.shape
        hidden = mask.expand(q_.shape[1] // L, L, S).reshape(-1, S)
        if self.softcap is None:
            return _softmax(torch.baddbmm(hidden, q_, k.transpose(1, 2), alpha=self.scale)), None
        tanh = torch.bmm(q_, k.transpose(1, 2)).mul_(self.scale / self.softcap).tanh_()
        return _softmax((tanh * self.softcap).add_(hidden)), tanh


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension. torch takes 32 half-precision numbers at a time and the rest of a row one by one, at ten
    times the cost each: rows that are short go through float32, which costs less than such a rest."""
    if scores.element_size() == 2 and scores.shape[-1] <= KEPT_KEYS:
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    return scores.softmax(-1)


class _TiledAttention(Function):
    """softmax(scale q k^T + mask) v, tile by tile: q [H, T, D], k and v [G, always + T, D] -> [T, H, D].

    The H / G query heads that share a key head lie under each other in one product, so that k and v are not repeated
    and their gradients sum by themselves.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        (H, T, D), G = q.shape, k.shape[0]
        out = q.new_empty(T, H, v.shape[-1])
        saved_probabilities: list[Tensor | None] = []
        for tile in rule.layout.tiles(rule.always, QUERIES_AT_ONCE):
            q_ = q[:, tile.queries].reshape(G, -1, D)
            probabilities, _ = rule.probabilities(q_, _at(k, tile.keys), rule.mask(tile, q))
            products = torch.bmm(probabilities, _at(v, tile.keys))
            out[tile.queries] = products.view(H, -1, v.shape[-1]).transpose(0, 1)
            saved_probabilities.append(probabilities if tile.shape[1] <= KEPT_KEYS and rule.softcap is None else None)
        ctx.save_for_backward(q, k, v, *saved_probabilities)
        ctx.rule = rule
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved_probabilities = ctx.saved_tensors
        rule, (H, _, D), G = ctx.rule, q.shape, k.shape[0]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for tile, probabilities in zip(
            rule.layout.tiles(rule.always, QUERIES_AT_ONCE), saved_probabilities, strict=True
        ):
            q_, k_, v_ = q[:, tile.queries].reshape(G, -1, D), _at(k, tile.keys), _at(v, tile.keys)
            tanh = None
            if probabilities is None:
                probabilities, tanh = rule.probabilities(q_, k_, rule.mask(tile, q))
            grad_out = grad[tile.queries].transpose(0, 1).reshape(G, -1, v.shape[-1])
            grad_p = torch.bmm(grad_out, v_.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, probabilities, -1, q.dtype).mul_(rule.scale)
            if tanh is not None:
                grad_scores.mul_(1 - tanh.square())
            grad_q[:, tile.queries] = torch.bmm(grad_scores, k_).view(H, -1, D)
            _add_at(grad_k, tile.keys, torch.bmm(grad_scores.transpose(1, 2), q_))
            _add_at(grad_v, tile.keys, torch.bmm(probabilities.transpose(1, 2), grad_out))
        return grad_q, grad_k, grad_v, None


def _at(t: Tensor, ranges: list[slice]) -> Tensor:
    return t[:, ranges[0]] if len(ranges) == 1 else torch.cat([t[:, r] for r in ranges], dim=1)


def _add_at(t: Tensor, ranges: list[slice], values: Tensor) -> None:
    for r, part in zip(ranges, values.split([r.stop - r.start for r in ranges], dim=1), strict=True):
        t[:, r] += part


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
    """Attention of the segments of a rule's layout: q [H, T, D], k and v [G, always + T, D] -> [T, H, D]."""
    if q.device.type != "cpu":
        return _stock_attention(q, k, v, rule)
    out: Tensor = _TiledAttention.apply(q, k, v, rule)
    return out


def _stock_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
    """The same by torch's own kernels, a segment at a time: for devices where those are fast."""
    outputs = []
    for tile in rule.layout.tiles(rule.always, None):
        q_, k_, v_ = q[None, :, tile.queries], _at(k, tile.keys)[None], _at(v, tile.keys)[None]
        if rule.softcap is not None:
            k_, v_ = (t.repeat_interleave(q.shape[0] // t.shape[1], dim=1) for t in (k_, v_))
            scores = rule.softcap * torch.tanh((q_ @ k_.transpose(2, 3) * rule.scale).float() / rule.softcap)
            product = (scores + rule.mask(tile, q)).softmax(-1).to(v.dtype) @ v_
        else:
            whole = tile.shape[0] == tile.shape[1] and (rule.window is None or rule.window >= tile.shape[1])
            mask = None if whole else rule.mask(tile, q)
            product = F.scaled_dot_product_attention(
                q_, k_, v_, mask, is_causal=whole, scale=rule.scale, enable_gqa=q.shape[0] != k.shape[0]
            )
        outputs.append(product[0].transpose(0, 1))
    return torch.cat(outputs)
