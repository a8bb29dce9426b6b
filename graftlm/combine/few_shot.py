"""The loss of a few examples as a function of the weights of adapters: what `search.py` minimizes.

    product     dW = sum_i w_i s_i B_i A_i                                    as `linear` composes
    factors     dW = (sum_i w_i s_i^1/2 B_i) (sum_i w_i s_i^1/2 A_i)          as `lorahub` composes

All adapters are on the model once, as one pair of factors at each site, and an evaluation writes into these. In product
space A = [A_1; A_2; ..] stays, and the columns of B = [w_1 s_1 B_1, w_2 s_2 B_2, ..] are scaled.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from graftlm.adapters.adapter import Adapter
from graftlm.combine.changes import changes_of
from graftlm.combine.compose import check_one_base, check_ranks
from graftlm.combine.core import Change
from graftlm.combine.search import Score
from graftlm.data.batches.pack import Pack
from graftlm.model.attach import detach
from graftlm.model.factors import attach_factors
from graftlm.model.modes import by_row
from graftlm.model.registry import known_hosts
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention

SumSpace = Literal["product", "factors"]

NAME = "graft-search"
"""The name under which the factors are on the model."""


@contextmanager
def few_shot_loss(
    model: Any,
    adapters: Sequence[Adapter],
    packs: Sequence[Pack],
    *,
    space: SumSpace = "product",
    needs_rank: bool = True,
) -> Iterator[Score]:
    """Inside, what gives the loss of weights: -log p in nats, the weighted mean over the supervised tokens of `packs`.

    Deltas that are active on the model do not act. Afterwards the model is as it was. `needs_rank`: adapters without
    exact factors are refused. Raises what `compose` raises for adapters that do not fit the base or each other.
    """
    with stacks_on(model, adapters, space=space, needs_rank=needs_rank) as stacks:
        hosts = known_hosts(model)
        acting = [(stack, hosts[site].factors[NAME]) for site, stack in stacks.items()]
        yield partial(_loss, model, acting, [pack.to(model.device) for pack in packs])


class Stack(NamedTuple):
    """The factors of all adapters at one site, float32, and what weights make of them."""

    A: Tensor
    """product: [R, d_in], R the sum of the ranks; factors: [m, r, d_in], m the adapters that have this site"""
    B: Tensor
    """product: [d_out, R]; factors: [m, d_out, r]"""
    of: Tensor
    """The adapter, from 0, of each of the R columns, or of each of the m; int64"""

    def to(self, device: torch.device) -> "Stack":
        return Stack(*(t.to(device) for t in self))

    def factors(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(A [r, d_in], B [d_out, r]) of weights [n]."""
        if self.A.dim() == 2:
            return self.A, self.B * w[self.of]
        return torch.tensordot(w[self.of], self.A, 1), torch.tensordot(w[self.of], self.B, 1)


@contextmanager
def stacks_on(
    model: Any, adapters: Sequence[Adapter], *, space: SumSpace, needs_rank: bool
) -> Iterator[dict[str, Stack]]:
    """Site -> the factors of all adapters, on the model's device. Inside, each site has factors NAME, of weights 0."""
    check_one_base(adapters)
    make = _of_products if space == "product" else _of_factors
    sites = {site: make(site, changes) for site, changes in _changes(model, adapters, needs_rank).items()}
    attach_factors(model, NAME, {site: stack.factors(torch.zeros(len(adapters))) for site, stack in sites.items()})
    try:
        yield {site: stack.to(model.device) for site, stack in sites.items()}
    finally:
        detach(model, NAME)


def _of_products(site: str, changes: Mapping[int, Change]) -> Stack:
    A = torch.cat([change.A.float() for change in changes.values()])
    B = torch.cat([change.scale * change.B.float() for change in changes.values()], dim=1)
    return Stack(A, B, torch.tensor([number for number, change in changes.items() for _ in change.A]))


def _of_factors(site: str, changes: Mapping[int, Change]) -> Stack:
    check_ranks(site, list(changes.values()))
    A = torch.stack([change.scale**0.5 * change.A.float() for change in changes.values()])
    B = torch.stack([change.scale**0.5 * change.B.float() for change in changes.values()])
    return Stack(A, B, torch.tensor(list(changes)))


def _changes(model: Any, adapters: Sequence[Adapter], needs_rank: bool) -> dict[str, dict[int, Change]]:
    """Site -> number of an adapter that has it, from 0 -> its change."""
    found: dict[str, dict[int, Change]] = {}
    for number, adapter in enumerate(adapters):
        with changes_of(model, adapter, f"{NAME}-{number}", needs_rank=needs_rank) as changes:
            for site, change in changes.items():
                found.setdefault(site, {})[number] = change()
    return found


@torch.no_grad()
def _loss(model: Any, acting: Sequence[tuple[Stack, Any]], packs: Sequence[Pack], weights: Sequence[float]) -> float:
    w = torch.tensor(weights, dtype=torch.float32, device=model.device)
    for stack, factors in acting:
        for here, made in zip(factors, stack.factors(w), strict=True):
            here.copy_(made)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    packed = any(len(pack.lengths) > 1 for pack in packs)
    with packed_attention(model) if packed else nullcontext(), by_row(model, [{NAME: 1.0}]):
        for pack in packs:
            total -= (pack.weights * log_probs(model, pack)).sum()
    return float(total) / sum(float(pack.weights.sum()) for pack in packs)
