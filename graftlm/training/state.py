"""The state of a run between two steps, as callbacks see it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from graftlm.data.batches.pack import Pack
from graftlm.deltas.base import Delta, DeltaConfig
from graftlm.model.registry import deltas_by_site, shared_of


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters by name that have one largest learning rate."""

    parameters: Mapping[str, nn.Parameter]
    rate: float
    at_embeddings: frozenset[str] = frozenset()
    """Names of those that belong to an embedding."""


@dataclass
class TrainingState:
    """What callbacks read and change."""

    model: nn.Module
    deltas: Mapping[str, DeltaConfig]
    """The deltas that learn, by name."""
    optimizer: torch.optim.Optimizer
    total: int = 0
    """Steps of the phase."""
    seed: int = 0
    done: int = 0
    """Optimizer steps so far: in `during` and `on_grads` those before this one, in `on_step` this one too."""
    first: int = 0
    """The batch of the run with which the phase begins."""
    seen: int = 0
    """Batches of the run before this one, those that were skipped too."""
    failures: int = 0
    """Steps in a row, up to this one, that were skipped because something was not finite."""
    zero_gradients: set[str] | None = None
    """Trainable tensors that had a zero gradient so far; None before the first step, empty after the second."""
    divisor: float = math.nan
    """In `during`: what the sums of the step's losses are divided by."""
    inner_loss: Callable[[bool], Tensor] | None = None
    """The mean loss over some rows of the inner validation split, for callbacks with `inner_share`: the same rows on
    every rank and for every call after as many steps. Called with True, it adds its gradient to every `.grad`."""
    clip: float = math.inf
    """The largest norm of the gradient of a step, for `fused` optimizers: nobody else can clip for them."""
    norm: float = math.nan
    """What a `fused` optimizer found that norm to be."""
    rehearsal: bool = False
    """In `during`: this pass over the packs computes the norm alone, and another one follows."""
    pack: Pack | None = None
    """In `during`: the rows that are computed."""
    last_pack: bool = False
    """In `during`: this backward pass completes the gradient of the step, and every loss of it was finite."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the current step beside those of its objective."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What callbacks did; each event becomes a line of metrics.jsonl."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter of the deltas that learn, by name, whether it is learning at this step or not."""
        inside = {id(p) for _, _, delta in self.sites() for p in delta.parameters()}
        shared = {id(p) for name in self.deltas for p in _shared(self.model, name)}
        return {name: p for name, p in self.model.named_parameters() if id(p) in inside | shared}

    def sites(self) -> Iterator[tuple[str, str, Delta]]:
        """(name of the delta, name of the site, the delta there), in the model's order."""
        return ((name, site, delta) for name, site, delta in deltas_by_site(self.model) if name in self.deltas)

    def generator(self, what: str) -> torch.Generator:
        """Random numbers that depend on the seed, on the steps done and on `what` they are for."""
        return torch.Generator().manual_seed(self.seed_for(what))

    def seed_for(self, what: object) -> int:
        """A number that depends on the seed, on the steps done and on `what` it is for."""
        return crc32(f"{self.seed}/{self.done}/{what}".encode())


def _shared(model: nn.Module, name: str) -> list[nn.Parameter]:
    shared = shared_of(model, name)
    return [] if shared is None else list(shared.parameters())
