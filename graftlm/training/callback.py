"""What a policy is: something that acts between steps, or on the numbers of a step, whatever the method and the loss.

    default_rate(rate)    the learning rate where the recipe gives none, from the method's
    groups(groups)        before the optimiser is made: other rates for some tensors
    optimiser(groups)     another optimiser than AdamW; one policy of a run at most
    state_bytes, waiting  how much memory its optimiser takes, and which parameters take none
    refuse(training)      why this policy has no meaning for what is trained here, or an empty text
    beside(others)        why it has none beside the run's other policies, or an empty text
    on_start(training)    before the first step of this process, after a resume too
    during(training)      held over the forward and backward passes of a step
    evaluating(training)  held where the deltas are looked at or written as an adapter in the middle of a run
    on_grads(training)    the gradient of the whole step stands in `.grad`, on every rank the same; before clipping
    on_step(training)     after the optimiser's step
    on_end(training)      after the last step, or where the run is stopped: the deltas are then as they shall be used

A policy overrides what it needs and nothing else. All that must outlive the process stands in two dicts, `tensors` and
`facts` (what JSON can say): checkpoints save and restore them, and nothing else of a policy. Randomness comes from
`training.generator`, which depends on the seed and the step alone: it needs no saving and is the same on all ranks.
Parameters keep their shape; what is switched off has zeros in it, or `requires_grad_(False)`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar
from zlib import crc32

import torch
from torch import Tensor, nn

from graftlm.config.schema import config
from graftlm.data.batches.pack import Pack
from graftlm.deltas.base import Delta, DeltaConfig
from graftlm.model.layers.registry import deltas_by_site, shared_of


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters by name that have one largest learning rate."""

    parameters: Mapping[str, nn.Parameter]
    rate: float
    at_embeddings: frozenset[str] = frozenset()
    """Which of them lie at an embedding, by name."""


@dataclass
class Training:
    """A run between two steps, as policies see it."""

    model: nn.Module
    deltas: Mapping[str, DeltaConfig]
    """The deltas that learn, by name."""
    optimiser: torch.optim.Optimizer
    total: int
    """Steps of the run."""
    seed: int
    done: int = 0
    """Optimiser steps so far: in `during` and `on_grads` those before this one, in `on_step` this one too."""
    aside: "Callable[[bool], Tensor] | None" = None
    """For policies with `wants_aside`: the mean loss over some of the rows that were put aside for them, the same on
    every rank and the same rows whenever it is asked after as many steps; given True, it adds its gradient to every
    `.grad`."""
    clip: float = math.inf
    """Largest norm of the gradient of a step, for `fused` policies: nobody else can clip for them."""
    norm: float = math.nan
    """What a `fused` policy found that norm to be."""
    rehearsal: bool = False
    """In `during`: the packs go through for the norm alone and come again, for policies that rehearse."""
    pack: Pack | None = None
    """In `during`: the rows that are computed."""
    last_pack: bool = False
    """In `during`: this backward pass completes the gradient of the step, and no loss of it was other than finite."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What else is to be told of the step at hand, beside what its objective tells."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What a policy did and a person would like to know; each becomes a line of metrics.jsonl."""

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


def torch_groups(groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """Groups as the optimisers of torch take them."""
    return [{"params": list(group.parameters.values()), "lr": group.rate} for group in groups]


def is_over(rank: int, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix with both sides over a rank: of others, a projection to that rank saves nothing."""
    return parameter.dim() == 2 and min(parameter.shape) > rank


def needs_matrices_over(rank: int, training: Training) -> str:
    """A reason to refuse where nothing that learns `is_over` this rank, or an empty text."""
    if any(is_over(rank, p) for p in training.parameters().values()):
        return ""
    return f"it acts on matrices with both sides over its rank of {rank}, and none that learns is"


def needs_method(training: Training, wanted: str) -> str:
    """A reason to refuse where a delta that learns has another method, or an empty text."""
    others = {config.method for config in training.deltas.values()} - {wanted}
    if not others:
        return ""
    return (
        f"it acts on what the method {wanted} has, and here {', '.join(sorted(others))} learns: take "
        f"`method: {wanted}`, and train other methods in a run of their own"
    )


def learn_from_aside(training: Training, chosen: Sequence[nn.Parameter]) -> None:
    """Let the gradient of these parameters be that of the rows put aside; all others keep theirs."""
    assert training.aside is not None
    everything = [p for p in training.parameters().values() if p.requires_grad]
    kept = {id(p): p.grad for p in everything}
    for p in everything:
        p.grad = None
    training.aside(True)
    wanted = {id(p) for p in chosen}
    for p in everything:
        p.grad = p.grad if id(p) in wanted else kept[id(p)]


def needs_aside(training: Training) -> str:
    """A reason to refuse where no rows were put aside, or an empty text."""
    return "" if training.aside is not None else "it learns from rows that are put aside, and here are none"


def _shared(model: nn.Module, name: str) -> list[nn.Parameter]:
    shared = shared_of(model, name)
    return [] if shared is None else list(shared.parameters())


@config
class PolicyConfig:
    name: str


class Policy:
    """Made as `Class(config)`, once a run."""

    paper: ClassVar[str]
    cost: ClassVar[str]
    """What it costs in time and memory, for the table in the documentation."""
    fused: ClassVar[bool] = False
    """The optimiser acts inside the backward pass: no gradient is left to look at or to clip when it ends."""
    rehearses: bool = False
    """Fused, and wants every step twice: first for the norm of its gradient, then to act."""
    wants_aside: ClassVar[float] = 0.0
    """The share of the training rows that is kept out of training for `training.aside`."""
    no_mean: ClassVar[str] = ""
    """Why a running mean of the parameters has no meaning beside this policy, where it has none."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.tensors: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}

    def kept(self, key: str, like: Tensor) -> Tensor:
        """`tensors[key]` on the device of `like`; at first zeros of its shape."""
        found = self.tensors.get(key)
        if found is None or found.device != like.device:
            self.tensors[key] = torch.zeros_like(like.detach()) if found is None else found.to(like.device)
        return self.tensors[key]

    def refuse(self, training: Training) -> str:
        return ""

    def beside(self, others: Sequence["Policy"]) -> str:
        return ""

    def state_bytes(self, parameter: nn.Parameter) -> int | None:
        """What its optimiser keeps of a parameter, for `graft estimate`; None where it brings no optimiser."""
        return None

    def waiting(self, training: Training) -> Sequence[nn.Parameter]:
        """Parameters that have neither a gradient nor an optimiser's state, at the time when the others are largest."""
        return ()

    def default_rate(self, rate: float) -> float:
        """The learning rate where the recipe gives none; `rate` is the method's, which was found with AdamW."""
        return rate

    def groups(self, groups: Sequence[ParameterGroup]) -> Sequence[ParameterGroup]:
        return groups

    def optimiser(self, groups: Sequence[ParameterGroup], *, weight_decay: float) -> torch.optim.Optimizer | None:
        return None

    def schedule(self, factor: Callable[[int], float]) -> Callable[[int], float]:
        """The factor on every learning rate at step 0, 1, ...; by default the recipe's."""
        return factor

    def on_start(self, training: Training) -> None: ...

    def during(self, training: Training) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluating(self, training: Training) -> AbstractContextManager[None]:
        return nullcontext()

    def on_grads(self, training: Training) -> None: ...

    def on_step(self, training: Training) -> None: ...

    def on_end(self, training: Training) -> None: ...
