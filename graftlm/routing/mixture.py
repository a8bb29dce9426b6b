"""The adapters of a library on a model as one mixture, whose weights a token router makes."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graftlm.generation.engine import model_lock
from graftlm.model.factors import attach_routed, detach_factors
from graftlm.model.modes import by_row, deltas_still
from graftlm.model.routed import Experts, Gates
from graftlm.routing.base import TokenRouter
from graftlm.routing.library import Library

_NUMBERS = itertools.count(1)


class Watched(NamedTuple):
    """The weights of the tokens of a text at one layer."""

    names: tuple[str, ...]
    weights: Tensor
    """[T, n]"""


_WATCHING: ContextVar[dict[str, Watched] | None] = ContextVar("graft_watching", default=None)


class Mixture:
    """On the model from here on until `close`. It acts on requests that name `delta`."""

    def __init__(self, library: Library, router: TokenRouter) -> None:
        """Raises AdapterError for an adapter without factors, TargetError for factors on no linear layer."""
        self.model, self.delta = library.model, f"graft-router-{next(_NUMBERS)}"
        factors = {name: library.factors(name) for name in library.names}
        with model_lock(self.model):
            attach_routed(self.model, self.delta, factors, lambda site, experts: _watched(router, site, experts))

    def close(self) -> None:
        with model_lock(self.model):
            detach_factors(self.model, self.delta)

    def watch(self, ids: Sequence[int]) -> dict[str, Watched]:
        """Site -> the weights of a prompt's tokens there, by one pass without a cache."""
        return watch(self.model, self.delta, ids)


@torch.no_grad()
def watch(model: Any, delta: str, ids: Sequence[int]) -> dict[str, Watched]:
    """The weights with which a mixture acts on the tokens of a text."""
    with model_lock(model), deltas_still(model), by_row(model, [{delta: 1.0}]), _watching() as found:
        model(input_ids=torch.tensor([list(map(int, ids))], device=model.device), use_cache=False)
    return found


@contextmanager
def _watching() -> Iterator[dict[str, Watched]]:
    found: dict[str, Watched] = {}
    token = _WATCHING.set(found)
    try:
        yield found
    finally:
        _WATCHING.reset(token)


def _watched(router: TokenRouter, site: str, experts: Experts) -> Gates:
    gates = router.gates(site, experts)

    def found(x: Tensor, inner: Tensor) -> Tensor:
        weights = gates(x, inner)
        if (seen := _WATCHING.get()) is not None:
            seen[site] = Watched(experts.names, weights)
        return weights

    return found
