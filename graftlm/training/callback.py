"""What a callback is: something that acts between steps, or on the numbers of a step, whatever the method and the loss.

    conflict_in(recipe)    why it has no meaning beside other parts of a recipe, or an empty text
    default_rate(rate)     the learning rate where the recipe gives none, from the method's
    groups(groups)         before the optimizer is made: other rates for some tensors
    schedule(factor)       another factor on the learning rate
    refusal(training)      why it has no meaning for what is trained here, or an empty text
    conflict(others)       why it has none beside the run's other callbacks, or an empty text
    on_start(training)     before the first step of this process, after a resume too
    rows(training, ...)    the rows of a step, where the callback makes them itself
    divisor(training, n)   what the sums of the step's losses are divided by; n is their count over the whole step
    during(training)       held over the forward and backward passes of a step
    on_pack(training, ...) in place of the backward pass of a pack
    evaluating(training)   held where the deltas are looked at or written as an adapter in the middle of a run
    on_grads(training)     the gradient of the whole step stands in `.grad`, on every rank the same; before clipping
    on_step(training)      after the optimizer's step
    on_end(training)       after the last step, or where the run is stopped: the deltas are then as they shall be used

A callback overrides what it needs and nothing else. An `Optimizer` is a callback that also makes the optimizer of
torch; a run has one. All that must outlive the process stands in two dicts, `tensors` and `facts` (what JSON can say):
checkpoints save and restore them, and nothing else of a callback. Randomness comes from `training.generator`, which
depends on the seed and the step alone: it needs no saving and is the same on all ranks. Parameters keep their shape;
what is switched off has zeros in it, or `requires_grad_(False)`.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.config.schema import config
from graftlm.data.batches.pack import Example, Group, Pack
from graftlm.errors import TrainingError
from graftlm.losses import LossSum
from graftlm.training.state import ParameterGroup, TrainingState

Rows = Sequence[Example | Group]


@config
class CallbackConfig:
    """The base of all configs of callbacks; each adds `name`, its key in CALLBACKS, and its options."""

    name: str


@config
class OptimizerConfig(CallbackConfig):
    """The base of all configs of optimizers; each adds `name`, its key in OPTIMIZERS, and its options."""


class Callback:
    """Made as `Class(config)`, once a phase of the run."""

    paper: ClassVar[str]
    cost: ClassVar[str]
    """What it costs in time and memory, for the table in the documentation."""
    inner_share: ClassVar[float] = 0.0
    """The share of the training rows that becomes the inner validation split, for `training.inner_loss`."""
    no_mean: ClassVar[str] = ""
    """Why a running mean of the parameters has no meaning beside this callback, where it has none."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.tensors: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}

    @classmethod
    def conflict_in(cls, recipe: Any) -> str:
        """`recipe` has the sections of a recipe as attributes."""
        if cls.inner_share and recipe.rl is not None:
            return "it learns from an inner validation split, and with `rl` the model writes the rows itself"
        return ""

    def buffer(self, key: str, like: Tensor) -> Tensor:
        """`tensors[key]` on the device of `like`; at first zeros of its shape."""
        found = self.tensors.get(key)
        if found is None or found.device != like.device:
            self.tensors[key] = torch.zeros_like(like.detach()) if found is None else found.to(like.device)
        return self.tensors[key]

    def default_rate(self, rate: float) -> float:
        """The learning rate where the recipe gives none; `rate` is the method's, which was found with AdamW."""
        return rate

    def groups(self, groups: Sequence[ParameterGroup]) -> Sequence[ParameterGroup]:
        return groups

    def schedule(self, factor: Callable[[int], float]) -> Callable[[int], float]:
        """The factor on every learning rate at step 0, 1, ...; by default the recipe's."""
        return factor

    def idle_parameters(self, training: TrainingState) -> Sequence[nn.Parameter]:
        """Parameters that have neither a gradient nor an optimizer's state, at the time when the others are largest."""
        return ()

    def refusal(self, training: TrainingState) -> str:
        return ""

    def conflict(self, others: Sequence["Callback"]) -> str:
        return ""

    def rows(
        self, training: TrainingState, number: int, rows_of: Callable[[int], Rows], last: int
    ) -> Sequence[Example | Group] | None:
        """What batch `number` trains on, or None for the rows of the data set, `rows_of(number)`. The phase ends before
        batch `last`."""
        return None

    def on_start(self, training: TrainingState) -> None: ...

    def divisor(self, training: TrainingState, count: float) -> float:
        """What the sums of the step's losses are divided by, instead of what is counted over all packs and ranks. The
        loss that a step reports stays the mean."""
        return count

    def on_pack(self, training: TrainingState, pack: Pack, part: LossSum, log_probs: Tensor) -> bool:
        """Whether this callback has added a gradient of the pack to every `.grad`, in place of the backward pass.

        `part` is the loss of the pack, of which `part.sum / training.divisor` would be differentiated, and `log_probs`
        [S] are those of its targets; both have a gradient. Ranks and packs are summed up. One callback of a run may
        have this hook; none beside an optimizer that is `fused`.
        """
        return False

    def during(self, training: TrainingState) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluating(self, training: TrainingState) -> AbstractContextManager[None]:
        return nullcontext()

    def on_grads(self, training: TrainingState) -> None: ...

    def on_step(self, training: TrainingState) -> None: ...

    def on_end(self, training: TrainingState) -> None: ...


class Optimizer(Callback):
    """A callback that makes the optimizer of torch, and may act between its steps as any other."""

    fused: ClassVar[bool] = False
    """It updates parameters inside the backward pass: no gradient is left to look at or to clip when that ends."""
    rehearses: bool = False
    """It is fused and computes every step twice: first for the norm of its gradient, then to act."""

    @abstractmethod
    def make(self, groups: Sequence[ParameterGroup], *, weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer for these groups. Raises TrainingError where its library is missing."""

    @abstractmethod
    def state_bytes(self, parameter: nn.Parameter) -> int:
        """What it remembers of a parameter, for `graft estimate`."""


@dataclass(frozen=True)
class CallbackRow:
    """A row of CALLBACKS or OPTIMIZERS: the config that names the callback, and its class."""

    config: type[CallbackConfig]
    callback: type[Callback]


# All callbacks of a phase: its optimizer, then the others in the order of the recipe -----------------------------


def default_rate(callbacks: Sequence[Callback], rate: float) -> float:
    """The learning rate of a method, where the recipe gives none."""
    for callback in callbacks:
        rate = callback.default_rate(rate)
    return rate


def make_optimizer(
    callbacks: Sequence[Callback], groups: Sequence[ParameterGroup], *, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer that the one `Optimizer` among them makes."""
    for callback in callbacks:
        groups = callback.groups(groups)
    (optimizer,) = (callback for callback in callbacks if isinstance(callback, Optimizer))
    return optimizer.make(groups, weight_decay=weight_decay)


def fused_optimizer(callbacks: Sequence[Callback]) -> Optimizer | None:
    """The optimizer, if it acts inside the backward pass."""
    return next((each for each in callbacks if isinstance(each, Optimizer) and each.fused), None)


def check_callbacks(callbacks: Sequence[Callback], training: TrainingState) -> None:
    """Raise TrainingError for a callback that has no meaning for what is trained, with its reason."""
    fused = fused_optimizer(callbacks)
    backward = [callback for callback in callbacks if type(callback).on_pack is not Callback.on_pack]
    if len(backward) > 1:
        raise TrainingError(
            f"{_section(backward[0])} and {_section(backward[1])} both take the place of the backward pass: a run may "
            "have one of them",
            code="conflicting-settings",
        )
    for callback in callbacks:
        if reason := callback.refusal(training):
            methods = ", ".join(dict.fromkeys(config.method for config in training.deltas.values()))
            raise TrainingError(f"{_section(callback)} with {methods}: {reason}", code="callback-unsupported")
        if reason := callback.conflict([other for other in callbacks if other is not callback]):
            raise TrainingError(f"{_section(callback)} beside {reason}", code="conflicting-settings")
        reads_gradients = type(callback).on_grads is not Callback.on_grads or callback in backward
        if reads_gradients and fused is not None and fused is not callback:
            raise TrainingError(
                f"{_section(callback)} acts on the gradient of a step, and optimizer {fused.config.name} leaves none",
                code="conflicting-settings",
            )


def _section(callback: Callback) -> str:
    """Where a recipe names it."""
    return f"{'optimizer' if isinstance(callback, Optimizer) else 'callbacks'}: {callback.config.name}"


# What several of them need ---------------------------------------------------------------------------------------


def torch_groups(groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """Groups as the optimizers of torch take them."""
    return [{"params": list(group.parameters.values()), "lr": group.rate} for group in groups]


def is_over(rank: int, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix with both sides over a rank: of others, a projection to that rank saves nothing."""
    return parameter.dim() == 2 and min(parameter.shape) > rank


def needs_matrices_over(rank: int, training: TrainingState) -> str:
    """A reason to refuse where nothing that learns `is_over` this rank, or an empty text."""
    if any(is_over(rank, p) for p in training.parameters().values()):
        return ""
    return f"it acts on matrices with both sides over its rank of {rank}, and none that learns is"


def needs_method(training: TrainingState, method: str) -> str:
    """A reason to refuse where a delta that learns has another method, or an empty text."""
    others = {config.method for config in training.deltas.values()} - {method}
    if not others:
        return ""
    return (
        f"it acts on what the method {method} has, and here {', '.join(sorted(others))} learns: take "
        f"`method: {method}`, and train other methods in a run of their own"
    )


def needs_inner_split(training: TrainingState) -> str:
    """A reason to refuse where there is no inner validation split, or an empty text."""
    return "" if training.inner_loss is not None else "it learns from an inner validation split, and there is none"


def use_inner_gradient(training: TrainingState, parameters: Sequence[nn.Parameter]) -> None:
    """Let the gradient of these parameters be that of the inner validation split; all others keep theirs."""
    assert training.inner_loss is not None
    everything = [p for p in training.parameters().values() if p.requires_grad]
    saved = {id(p): p.grad for p in everything}
    for p in everything:
        p.grad = None
    training.inner_loss(True)
    chosen_ids = {id(p) for p in parameters}
    for p in everything:
        p.grad = p.grad if id(p) in chosen_ids else saved[id(p)]


def part_that_makes_passes(recipe: Any) -> str:
    """Which part of a recipe makes passes beside the one that learns: over a reference, a teacher or the base."""
    if recipe.loss.makes_passes:
        return f"loss {recipe.loss.name}"
    return next((f"regulariser {each.name}" for each in recipe.regularisers if each.makes_passes), "")
