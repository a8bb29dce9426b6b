"""What acts at a site: deltas and fixed factors, each with the share of its change that is made."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.deltas.base import AdditiveDelta, AroundDelta, Delta, WeightDelta
from graftlm.model.bases import Residual
from graftlm.model.routed import RoutedFactors


class FixedFactors(NamedTuple):
    """A low-rank change dW = B A of a layer, for answers alone: nothing of it learns, and no module holds it."""

    A: Tensor
    """[r, d_in]"""
    B: Tensor
    """[d_out, r], the scale of the adapter in it."""


Acting = tuple[Delta | FixedFactors | RoutedFactors, float]
"""What acts, and the share of its change that is made: 1 for all of it."""

Change = WeightDelta | FixedFactors
"""What changes the weights of a layer."""

Additive = AdditiveDelta | FixedFactors

Fast = tuple[Tensor, Tensor, float]
"""(A [r, d_in], B [d_out, r], share): share * B A is added to the weights."""


class Split(NamedTuple):
    """What acts on some tokens at a layer, by how it is computed."""

    fast: list[Fast]
    """Changes with factors."""
    slow: list[tuple[AdditiveDelta, float]]
    """Other changes that are added."""
    folded: list[tuple[Change, float]]
    """Changes of weights in order, where one of them is not added; `fast` and `slow` are empty then."""
    others: list[tuple[Delta | RoutedFactors, float]]
    """Changes of the output."""

    @property
    def takes_base(self) -> bool:
        """Whether all of it acts on what the frozen layer returns."""
        if self.folded:
            return False
        first = self.others[0] if self.others and not self.fast and not self.slow else None
        return first is None or first[0].wants_y or first[1] != 1


def around(parts: Split) -> AroundDelta | None:
    """What stands around a product with the base that other tokens may share: it must be all that changes weights."""
    if len(parts.folded) != 1:
        return None
    delta, share = parts.folded[0]
    shares = isinstance(delta, AroundDelta) and share == 1 and delta.offset_A is None and not drops(delta)
    return cast("AroundDelta", delta) if shares else None


def split(acting: Sequence[Acting]) -> Split:
    """Changes of weights act on the frozen layer, any other delta on an output: so changes of weights come first."""
    others = [(d, share) for d, share in acting if not isinstance(d, WeightDelta | FixedFactors)]
    changes = [(d, share) for d, share in acting if isinstance(d, WeightDelta | FixedFactors)]
    if not all(isinstance(d, AdditiveDelta | FixedFactors) for d, _ in changes):
        return Split([], [], changes, others)
    fast: list[Fast] = []
    slow: list[tuple[AdditiveDelta, float]] = []
    for d, share in changes:
        if isinstance(d, FixedFactors):
            fast.append((*d, share))
            continue
        assert isinstance(d, AdditiveDelta)
        factors = None if drops(d) or has_own_increment(d) else all_factors(d)
        if factors is None:
            slow.append((d, share))
        else:
            fast.append((*factors, share))
    return Split(fast, slow, [], others)


def as_one(fast: Sequence[Fast]) -> tuple[Tensor, Tensor] | None:
    """(A, B) of several changes with factors, as float32 at least; None for none."""
    if not fast:
        return None
    if len(fast) == 1 and fast[0][2] == 1:
        return widened(fast[0][0]), widened(fast[0][1])
    A = torch.cat([widened(A) for A, _, _ in fast])
    return A, torch.cat([widened(B) if share == 1 else share * widened(B) for _, B, share in fast], dim=1)


def widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def key_of(acting: Sequence[Acting]) -> tuple[tuple[int, float], ...]:
    return tuple((id(d), share) for d, share in acting)


def has_own_increment(delta: AdditiveDelta) -> bool:
    return type(delta).increment is not AdditiveDelta.increment


def drops(delta: Delta | FixedFactors | RoutedFactors) -> bool:
    return isinstance(delta, Delta) and delta.training and delta.config.dropout > 0


def dropped(x: Tensor, delta: Delta | RoutedFactors) -> Tensor:
    if not isinstance(delta, Delta):
        return x
    return F.dropout(x, delta.config.dropout, training=drops(delta)) if x.is_floating_point() else x


def in_dtype_of(x: Tensor) -> Any:
    """Inside, float32 parameters multiply x in its own precision, as the frozen layers do."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(x.device.type, dtype=x.dtype) if half else nullcontext()


def partly(y: Tensor, changed: Tensor, share: float) -> Tensor:
    """y with a share of the change that a delta made of it."""
    return changed if share == 1 else y + share * (changed - y)


def residual(delta: Delta, base: Any) -> Any:
    """The base as this delta sees it: less its offset, where an init took one from W."""
    if delta.offset_A is None or delta.offset_B is None:
        return base
    return Residual(base, delta.offset_A, delta.offset_B)


def folded(change: Change, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(W', b') of a change with its offset, in float32."""
    if isinstance(change, FixedFactors):
        return W + widened(change.B) @ widened(change.A), b
    if change.offset_A is not None and change.offset_B is not None:
        W = W - change.offset_B @ change.offset_A
    return change.effective(W, b)


def folded_partly(change: Change, share: float, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W and b with a share of what a change makes of them."""
    W_, b_ = folded(change, W, b)
    if share == 1:
        return W_, b_
    before = torch.zeros_like(b_) if b is None and b_ is not None else b
    return W + share * (W_ - W), None if b_ is None or before is None else partly(before, b_, share)


def all_factors(delta: AdditiveDelta) -> tuple[Tensor, Tensor] | None:
    """(A, B) of a delta with its offset: what it adds to the untouched base, exactly; None where it has no factors."""
    factors = delta.factors()
    if factors is None or delta.offset_A is None or delta.offset_B is None:
        return factors
    return torch.cat([factors[0], delta.offset_A]), torch.cat([factors[1], -delta.offset_B], dim=1)
