"""How a layer computes a pass over tokens of several requests: the base once, and the changes of all spans at once.

A plan is made once for a sequence of rows (`Route.rows`) and kept by the host until one of its deltas changes; where
the spans begin and end may be another in each pass. The rows of one product with W are, end to end,

    the tokens of the spans that take the base        bare, with factors, or with what changes its output
    what an `AroundDelta` makes of its own tokens     `input(x)`; its `output` changes what comes back

What folds deltas into the weights, or needs no output of the base, computes its own spans, and the base is spared them.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.deltas.base import AroundDelta, Delta
from graftlm.kernels.many_low_rank import Bounds, Change, Changes, ManyLowRank
from graftlm.model.acting import Acting, Split, around, in_dtype_of, split
from graftlm.model.bases import LinearBase
from graftlm.model.routes import Route

Here = tuple[tuple[str, float], ...]
"""The deltas of a row at one site, each with its weight."""


class Group(NamedTuple):
    """Spans beside each other that have the same deltas here."""

    first: int
    stop: int
    here: Here
    parts: Split
    tokens: str
    """What tells its tokens from those of other groups, where the deltas have a tape of activations."""
    around: AroundDelta | None
    """The change of weights that takes part in the product of all groups, if there is one."""
    takes_base: bool
    """Whether its own tokens are multiplied by the base."""


class Plan(NamedTuple):
    groups: list[Group]
    """In order."""
    many: ManyLowRank | None
    """The changes with factors of the spans that take the base; None where there are none."""
    takers: tuple[int, ...]
    """The spans that take the base."""

    uniform: bool
    """Whether all spans have the same deltas here."""
    simple: bool
    """Whether there is nothing but the base and changes with factors."""

    @property
    def is_base(self) -> bool:
        return all(not group.here for group in self.groups)


class Parts(NamedTuple):
    """The deltas of a row at one site: the same in every plan that has such a row."""

    split: Split
    changes: Changes
    """Those with factors, as the kernel reads them."""
    around: AroundDelta | None
    takes_base: bool
    alone: bool
    """Whether they may keep activations for other sites: at each site they must be those of the same tokens."""


def parts_of(acting: list[Acting]) -> Parts:
    found = split(acting)
    own = [*found.slow, *found.folded, *found.others]
    alone = any(isinstance(delta, Delta) and delta.site.shared is not None for delta, _ in own)
    delta = around(found)
    if delta is None:
        return Parts(found, Changes(Change(*each) for each in found.fast), None, found.takes_base, alone)
    inside = delta.inside()
    changes = Changes([] if inside is None else [Change(*inside)])
    return Parts(found, changes, delta, type(delta).input is AroundDelta.input, alone)


def plan_of(heres: list[Here], d_out: int, parts: Callable[[Here], Parts]) -> Plan:
    """The plan for spans with these deltas; a single span where all have the same."""
    made = {here: parts(here) for here in dict.fromkeys(heres)}
    keys = [(here, f"span {n}" if made[here].alone and len(heres) > 1 else "") for n, here in enumerate(heres)]
    if len(set(keys)) == 1:
        keys = keys[:1]
    groups: list[Group] = []
    changes: list[Changes] = []
    takers: list[int] = []
    at = 0
    for (here, tokens), alike in groupby(keys):
        first, at = at, at + len(list(alike))
        group = Group(first, at, here, made[here].split, tokens, made[here].around, made[here].takes_base)
        groups.append(group)
        if group.takes_base:
            takers += range(first, at)
            changes += [made[here].changes] * (at - first)
    many = ManyLowRank(changes, d_out) if any(changes) else None
    rest = any(_has_more(group) or not group.takes_base for group in groups)
    return Plan(groups, many, tuple(takers), len(groups) == 1, many is not None and not rest)


def _has_more(group: Group) -> bool:
    """Whether something is left to do with what the product has for its tokens."""
    return group.around is not None or bool(group.parts.slow or group.parts.others)


def computed(plan: Plan, host: Any, route: Route, x: Tensor) -> Tensor:
    """The output of a host's layer for x [.. T, d_in]."""
    view: LinearBase = host.view
    if plan.simple and x.dim() == 3 and x.shape[1] == route.tokens and len(x) == 1 and plan.many is not None:
        bounds = route.whole(x.shape[1]) if plan.uniform else route.bounds
        return view.plus(x, plan.many(x, bounds))
    if plan.uniform:
        group = plan.groups[0]
        if not group.takes_base:
            with host.acting_as(group.here) as acting:
                whole: Tensor = host.alone(acting, x)
                return whole
    else:
        route.token_dimension(x, host.where)
    rows = x.reshape(-1, x.shape[-1])
    bounds = route.whole(len(rows)) if plan.uniform else route.bounds
    if len(plan.takers) == len(bounds.spans):
        y = _changed(plan, host, rows, _product(plan, view, rows, bounds), bounds)
    else:
        y = rows.new_empty(len(rows), view.d_out)
        _apart(plan, host, rows, y, bounds)
    return y.view(*x.shape[:-1], y.shape[-1])


def _product(plan: Plan, view: LinearBase, rows: Tensor, bounds: Bounds, more: Sequence[Tensor] = ()) -> Tensor:
    """W on the rows that take the base, with the changes that have factors, and on the rows of `more` behind them."""
    added = None if plan.many is None or not len(rows) else plan.many(rows, bounds)
    if more:
        rows = torch.cat([rows, *more])
        added = None if added is None else F.pad(added, (0, 0, 0, len(rows) - len(added)))
    return view(rows) if added is None else view.plus(rows, added)


def _changed(plan: Plan, host: Any, rows: Tensor, y: Tensor, bounds: Bounds) -> Tensor:
    """y, what the base makes of the spans that take it (their tokens end to end in `rows`), with their other changes
    made too."""
    at = 0
    for group in plan.groups:
        if not group.takes_base:
            continue
        first, at = at, at + group.stop - group.first
        if _has_more(group):
            start, stop = bounds.spans[first][0], bounds.spans[at - 1][1]
            with host.acting_as(group.here, group.tokens):
                changed = _behind(group, host, rows[start:stop], y[start:stop])
            y = changed if plan.uniform else _put(y, start, stop, changed)
    return y


def _behind(group: Group, host: Any, x: Tensor, z: Tensor) -> Tensor:
    """The output of a group's tokens x from z, what the product has for them."""
    if group.around is not None:
        with in_dtype_of(x):
            z = group.around.output(z, x, host.view).to(x.dtype)
    changed: Tensor = host.rest(group.parts, x, z)
    return changed


def _put(y: Tensor, start: int, stop: int, part: Tensor) -> Tensor:
    y[start:stop] = part
    return y


def _apart(plan: Plan, host: Any, rows: Tensor, y: Tensor, bounds: Bounds) -> None:
    """Write into y: what takes part in the product together, and each of the other groups by itself."""
    places = []
    arounds: list[tuple[Group, slice, Tensor]] = []
    for group in plan.groups:
        start, stop = bounds.spans[group.first][0], bounds.spans[group.stop - 1][1]
        if group.takes_base:
            places.append((start, stop))
            continue
        with host.acting_as(group.here, group.tokens) as acting:
            inner = _input(group, rows[start:stop])
            if inner is None:
                y[start:stop] = host.alone(acting, rows[start:stop])
            else:
                arounds.append((group, slice(start, stop), inner))
    if not places and not arounds:
        return
    together = torch.cat([rows[a:b] for a, b in places]) if places else rows[:0]
    more = [inner.reshape(-1, inner.shape[-1]) for _, _, inner in arounds]
    z = _product(plan, host.view, together, bounds.of(plan.takers), more)
    own, *others = z.split([len(together), *map(len, more)])
    if places:
        own = _changed(plan, host, together, own, bounds.of(plan.takers))
        for part, (a, b) in zip(own.split([b - a for a, b in places]), places, strict=True):
            y[a:b] = part
    for (group, here, inner), part in zip(arounds, others, strict=True):
        with host.acting_as(group.here, group.tokens):
            y[here] = _behind(group, host, rows[here], part.view(*inner.shape[:-1], part.shape[-1]))


def _input(group: Group, x: Tensor) -> Tensor | None:
    """What the product has for a group that does not take the base itself; None: it computes by itself."""
    if group.around is None:
        return None
    with in_dtype_of(x):
        inner = group.around.input(x)
    return None if inner is None else inner.to(x.dtype)
