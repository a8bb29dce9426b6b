"""Weights of adapters for each layer from a few rows, by gradient. What it is for: `rules/cat.py`.

    min over a [layers, n] of L(a)        dW^l = sum_i a_i^l s_i B_i A_i = B diag(a of each column) A

L is the mean loss of the composed model on the rows, in nats per supervised token. A = [A_1; A_2; ..] and
B = [s_1 B_1, s_2 B_2, ..] stay, so A x is computed once for all adapters. Adam (Kingma and Ba 2014, arXiv:1412.6980)
starts where each a is 1 / n; every step sees all rows. The best a that was seen is the result.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graftlm.adapters.adapter import Adapter
from graftlm.combine.few_shot import NAME, Stack, stacks_on
from graftlm.data.batches.pack import Pack
from graftlm.errors import RecipeError
from graftlm.model.acting import FixedFactors
from graftlm.model.modes import by_row
from graftlm.model.registry import known_hosts
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention


class LayerWeights(NamedTuple):
    """The best weights that Adam has seen."""

    weights: dict[str, tuple[float, ...]]
    """Site -> one for each adapter; 0 for an adapter that does not change this site."""
    value: float
    """The loss of these weights."""
    evaluations: int
    """How often the loss was computed."""
    by: str
    """The optimizer."""
    start: float
    """The loss where each adapter has 1 / n."""


class LayerLoss(NamedTuple):
    """The loss of a few rows as a function of weights for each layer."""

    sites: list[str]
    """The layers, in the order of the rows of a."""
    present: Tensor
    """Whether an adapter changes a layer: bool [layers, n]."""
    loss: Callable[[Tensor], float]
    """a [layers, n] -> L(a). Where a learns, its gradient is added to `a.grad`."""


@contextmanager
def layer_loss(
    model: Any, adapters: Sequence[Adapter], packs: Sequence[Pack], *, needs_rank: bool = True
) -> Iterator[LayerLoss]:
    """Inside, the loss of weights; afterwards the model is as it was. Deltas that are active on it do not act.

    `needs_rank`: adapters without exact factors are refused. Raises what `compose` raises for adapters that do not fit
    the base or each other.
    """
    with stacks_on(model, adapters, space="product", needs_rank=needs_rank) as stacks:
        here = [pack.to(model.device) for pack in packs]
        count = sum(float(pack.weights.sum()) for pack in here)
        present = torch.zeros(len(stacks), len(adapters), dtype=torch.bool)
        for row, stack in enumerate(stacks.values()):
            present[row, stack.of.cpu()] = True

        def loss(a: Tensor) -> float:
            total = 0.0
            for pack in here:
                part = -(pack.weights * _log_probs(model, pack, stacks, a.to(model.device))).sum() / count
                if a.requires_grad:
                    part.backward()
                total += float(part.detach())
            return total

        yield LayerLoss(list(stacks), present, loss)


def learn_layer_weights(
    model: Any,
    adapters: Sequence[Adapter],
    packs: Sequence[Pack],
    *,
    evaluations: int,
    learning_rate: float,
    needs_rank: bool = True,
) -> LayerWeights:
    """The weights with the smallest loss of so many steps of Adam, less one: the last step is only looked at.

    Nothing is drawn. Raises RecipeError for a loss at the start that is not finite.
    """
    assert evaluations > 0
    with layer_loss(model, adapters, packs, needs_rank=needs_rank) as (sites, present, loss):
        a = (present / len(adapters)).requires_grad_()
        adam = torch.optim.Adam([a], lr=learning_rate)
        best, value, start = a.detach().clone(), float("inf"), float("nan")
        for step in range(evaluations):
            adam.zero_grad()
            found = loss(a if step < evaluations - 1 else a.detach())
            if step == 0:
                start = _usable(found)
            if found < value:
                best, value = a.detach().clone(), found
            if step == evaluations - 1 or not isfinite(found):
                break
            adam.step()
    weights = {site: tuple(row) for site, row in zip(sites, best.tolist(), strict=True)}
    return LayerWeights(weights, value, step + 1, "Adam", start)


def _usable(start: float) -> float:
    if not isfinite(start):
        raise RecipeError(
            "search: the loss of the mean of the adapters on the examples is not finite: look at the rows, or load the "
            "base in float32",
            code="unusable-score",
        )
    return start


def _log_probs(model: Any, pack: Pack, stacks: dict[str, Stack], a: Tensor) -> Tensor:
    hosts = known_hosts(model)
    for weights, (site, stack) in zip(a, stacks.items(), strict=True):
        hosts[site].factors[NAME] = FixedFactors(*stack.factors(weights))
    packed = packed_attention(model) if len(pack.lengths) > 1 else nullcontext()
    with torch.set_grad_enabled(a.requires_grad), packed, by_row(model, [{NAME: 1.0}]):
        return log_probs(model, pack)
