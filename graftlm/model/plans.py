"""How a layer computes a pass over tokens of several requests: the base once, and the changes of all spans at once.

A plan is made once for a sequence of rows (`Route.rows`) and kept by the host until one of its deltas changes; where
the spans begin and end may be another in each pass. What folds deltas into the weights, or needs no output of the
base, computes its own spans, and the base is spared them.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graftlm.deltas.base import Delta
from graftlm.kernels.many_low_rank import Bounds, Change, Changes, ManyLowRank
from graftlm.model.acting import Acting, Split, split
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
    alone: bool
    """Whether they may keep activations for other sites: at each site they must be those of the same tokens."""


def parts_of(acting: list[Acting]) -> Parts:
    found = split(acting)
    own = [*found.slow, *found.folded, *found.others]
    alone = any(isinstance(delta, Delta) and delta.site.shared is not None for delta, _ in own)
    return Parts(found, Changes(Change(*each) for each in found.fast), alone)


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
        group = Group(first, at, here, made[here].split, tokens)
        groups.append(group)
        if group.parts.takes_base:
            takers += range(first, at)
            changes += [made[here].changes] * (at - first)
    many = ManyLowRank(changes, d_out) if any(changes) else None
    rest = any(group.parts.slow or group.parts.others or not group.parts.takes_base for group in groups)
    return Plan(groups, many, tuple(takers), len(groups) == 1, many is not None and not rest)


def computed(plan: Plan, host: Any, route: Route, x: Tensor) -> Tensor:
    """The output of a host's layer for x [.. T, d_in]."""
    view: LinearBase = host.view
    if plan.simple and x.dim() == 3 and x.shape[1] == route.tokens and len(x) == 1 and plan.many is not None:
        bounds = route.whole(x.shape[1]) if plan.uniform else route.bounds
        return view.plus(x, plan.many(x, bounds))
    if plan.uniform:
        group = plan.groups[0]
        if not group.parts.takes_base:
            with host.acting_as(group.here) as acting:
                whole: Tensor = host.alone(acting, x)
                return whole
    else:
        route.token_dimension(x, host.where)
    rows = x.reshape(-1, x.shape[-1])
    bounds = route.whole(len(rows)) if plan.uniform else route.bounds
    if len(plan.takers) == len(bounds.spans):
        y = _on_base(plan, host, rows, bounds)
    else:
        y = rows.new_empty(len(rows), view.d_out)
        _apart(plan, host, rows, y, bounds)
    return y.view(*x.shape[:-1], y.shape[-1])


def _on_base(plan: Plan, host: Any, rows: Tensor, bounds: Bounds) -> Tensor:
    """The spans that take the base, their tokens end to end in `rows`."""
    view: LinearBase = host.view
    y = view(rows) if plan.many is None or not len(rows) else view.plus(rows, plan.many(rows, bounds))
    at = 0
    for group in plan.groups:
        if not group.parts.takes_base:
            continue
        first, at = at, at + group.stop - group.first
        if group.parts.slow or group.parts.others:
            start, stop = bounds.spans[first][0], bounds.spans[at - 1][1]
            with host.acting_as(group.here, group.tokens):
                changed = host.rest(group.parts, rows[start:stop], y[start:stop])
            y = changed if plan.uniform else _put(y, start, stop, changed)
    return y


def _put(y: Tensor, start: int, stop: int, part: Tensor) -> Tensor:
    y[start:stop] = part
    return y


def _apart(plan: Plan, host: Any, rows: Tensor, y: Tensor, bounds: Bounds) -> None:
    """Write into y: the spans that take the base together, and each group of others by itself."""
    places = []
    for group in plan.groups:
        start, stop = bounds.spans[group.first][0], bounds.spans[group.stop - 1][1]
        if group.parts.takes_base:
            places.append((start, stop))
        else:
            with host.acting_as(group.here, group.tokens) as acting:
                y[start:stop] = host.alone(acting, rows[start:stop])
    if plan.takers:
        together = _on_base(plan, host, torch.cat([rows[a:b] for a, b in places]), bounds.of(plan.takers))
        for part, (a, b) in zip(together.split([b - a for a, b in places]), places, strict=True):
            y[a:b] = part
