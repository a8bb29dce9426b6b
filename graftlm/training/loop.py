"""The training loop: a generator of steps that reads top to bottom.

    for step in steps(model, batches, loss, optimizer, schedule):
        ...                              # logging, evaluating, saving are ordinary statements of the caller

The loss of a step is the sum over the supervised tokens (or pairs, or answers: `losses`) of all its packs, divided by
their count: how a batch is split into packs, and those among processes, changes memory and time, not the result.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm import distributed
from graftlm.data.batches.pack import Pack
from graftlm.errors import TrainingError, numbered
from graftlm.kernels.backend import TORCH, Backend
from graftlm.losses import LossConfig
from graftlm.model.layers.registry import penalty, trainable
from graftlm.model.layers.sites import transformer_layers
from graftlm.model.passes.packed_attention import packed_attention
from graftlm.model.passes.recompute import offloaded, recomputed_layers
from graftlm.training.callback import Callback, Optimizer, check_callbacks, fused_optimizer
from graftlm.training.objective import Objective, Sums
from graftlm.training.regularizers import RegularizerConfig, check_regularizers, kl_to_base, terms, weighted
from graftlm.training.state import TrainingState


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. `loss` is what the objective says, before the step and without penalties: of
    supervised training nats per supervised token, of others what its file says, a pair or an answer."""

    number: int
    """Of the batch, from 1."""
    done: int
    """Optimizer steps so far: `number` less what was skipped."""
    loss: float
    tokens: int
    """Of the rows."""
    computed_tokens: int
    """Less than `tokens` where rows of a pack share their beginnings."""
    supervised_tokens: float
    grad_norm: float
    learning_rate: float
    wall_s: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What else the objective tells of the step: margins, log-probabilities of chosen and rejected answers."""
    skipped: str = ""
    """Why the step was skipped, if it was: something was not finite, or there was nothing to learn from. Nothing was
    changed then."""
    rows: tuple[str, ...] = ()
    """The rows that it comes from."""
    events: tuple[dict[str, Any], ...] = ()
    """What callbacks did at this step."""


def steps(
    model: nn.Module,
    batches: Iterable[Sequence[Pack]],
    *,
    loss: LossConfig | str,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    clip: float,
    callbacks: Sequence[Callback] = (),
    regularizers: Sequence[RegularizerConfig] = (),
    training: TrainingState | None = None,
    seen: int = 0,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    packed: bool = True,
    checkpointing: bool = False,
    offload: bool = False,
    backend: Backend = TORCH,
) -> Iterator[Step]:
    """Train the model's deltas, one optimizer step for each batch of packs: this rank's, where there are several.

    `regularizers` are added to what is minimized, and to a step's metrics. `training` is what callbacks see; `seen`
    batches came before these, of which `training.done` were steps.

    Raises TrainingError, before anything is changed by that step, for a loss or gradient that is not finite (naming
    the rows), for a trainable tensor that gets no gradient (naming the tensor) and where memory is not enough. With
    `on_nonfinite="skip"` a step that is not finite changes nothing and the next batch follows; after three in a row it
    is an error again.
    """
    # Longer than 60 lines: the arguments and the order of a step are the interface of training.
    objective = Objective(loss, kl_to_base(regularizers))
    check_regularizers(regularizers, model)
    run = training or TrainingState(model=model, deltas={}, optimizer=optimizer, total=0, seed=0)
    check_callbacks(callbacks, run)
    for callback in callbacks:
        callback.on_start(run)
    _check_fused(fused_optimizer(callbacks), regularizers, model)
    passes = partial(training_pass, model, packed=packed, checkpointing=checkpointing, offload=offload, backend=backend)
    gradient = _Gradient(run, objective, callbacks, regularizers, passes)
    failures = 0
    for number, packs in enumerate(batches, start=seen):
        started, batch = time.perf_counter(), _Batch(objective, packs)
        extra_metrics, run.metrics = run.metrics, {}
        found = _Found(skipped=f"step {number + 1} has nothing to learn from")
        if batch.count:  # else answers that the model gave itself were all as good as each other
            factor = schedule(run.done)
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("largest_lr", group["lr"]) * factor
            run.clip, run.norm = clip, math.nan
            with _memory_explained(model, batch.packs, number + 1, checkpointing):
                found = gradient(batch, number + 1)
                if not found.skipped:
                    optimizer.step()
            failures = failures + 1 if found.skipped else 0
            if found.skipped and (on_nonfinite == "stop" or failures == MOST_SKIPPED):
                raise NotFiniteError(_not_finite(found, failures), code="not-finite")
            if not found.skipped:
                run.done += 1
                for callback in callbacks:
                    callback.on_step(run)
            optimizer.zero_grad(set_to_none=True)
        else:
            failures = 0
        events, run.events = tuple(run.events), []
        yield Step(
            number=number + 1,
            done=run.done,
            loss=found.loss,
            tokens=int(batch.tokens),
            computed_tokens=int(batch.computed),
            supervised_tokens=batch.supervised,
            metrics={**extra_metrics, **found.metrics},
            grad_norm=found.norm,
            learning_rate=optimizer.param_groups[0]["lr"],
            wall_s=time.perf_counter() - started,
            skipped=found.skipped,
            rows=found.rows,
            events=events,
        )


class _Batch:
    """The packs of a step, and what they count, summed over the ranks."""

    def __init__(self, objective: Objective, packs: Sequence[Pack]) -> None:
        self.packs = [pack for pack in packs if not pack.mismatched]
        self.mismatched = [pack for pack in packs if pack.mismatched]
        self.count, self.supervised, self.tokens, self.computed = distributed.totals(
            sum(map(objective.count, self.packs)),
            sum(float(pack.weights.sum()) for pack in self.packs),
            sum(pack.row_tokens for pack in self.packs),
            sum(pack.ids.numel() for pack in packs),
        )
        if not self.count:
            self.tokens = self.computed = self.supervised = 0.0  # nothing goes through the model


@dataclass(frozen=True)
class _Found:
    """What the passes of a step found; nan where it is skipped."""

    loss: float = math.nan
    norm: float = math.nan
    metrics: Mapping[str, float] = field(default_factory=dict)
    skipped: str = ""
    """Why the step must not be taken, or an empty text."""
    rows: tuple[str, ...] = ()
    """The rows that this comes from."""


@dataclass
class _Gradient:
    """Puts the gradient of a step into `.grad`, clipped and the same on every rank, or says why it is not finite."""

    run: TrainingState
    objective: Objective
    callbacks: Sequence[Callback]
    regularizers: Sequence[RegularizerConfig]
    passes: Callable[[], AbstractContextManager[None]]
    still: set[str] | None = field(init=False)
    """See `_check_gradients`."""

    def __post_init__(self) -> None:
        self.still = None if self.run.done == 0 else set()

    def __call__(self, batch: _Batch, number: int) -> _Found:
        run, fused = self.run, fused_optimizer(self.callbacks)
        parameters = trainable(run.model)
        for run.rehearsal in (True, False) if fused is not None and fused.rehearses else (False,):
            sums, bad = _passes(run, self.objective, self.callbacks, batch, self.passes)
            if bad or (run.rehearsal and not math.isfinite(run.norm)):
                break
        total, metrics = sums.totals()
        if distributed.totals(len(bad))[0]:
            return _Found(skipped=f"the loss of step {number} is not finite", rows=tuple(distributed.gathered(bad)))
        metrics |= self._add_penalties()
        distributed.sum_gradients(parameters.values())
        norm = torch.tensor(run.norm) if fused is not None else self._clipped(parameters)
        if torch.isfinite(norm):
            return _Found(total / batch.count, float(norm), metrics)
        named = distributed.gathered([row for pack in batch.packs for row in pack.rows])
        return _Found(skipped=f"the gradient of step {number} is not finite", rows=tuple(dict.fromkeys(named)))

    def _add_penalties(self) -> dict[str, float]:
        """The gradients of what is a function of the deltas alone: once, not once a rank. Its values, by name."""
        added, own = terms(self.regularizers, self.run.model), penalty(self.run.model)
        extras = [*weighted(added), *([] if own is None else [own])]
        if distributed.first() and extras:
            torch.stack(extras).sum().backward()
        return {name: float(value.detach()) for name, (_, value) in added.items()}

    def _clipped(self, parameters: dict[str, nn.Parameter]) -> Tensor:
        """Let callbacks see the gradient, and clip it; its norm before that."""
        self.still = _check_gradients(parameters, self.still, self.run.done)
        norm = _norm(parameters)
        if self.callbacks and torch.isfinite(norm):  # callbacks remember what they see
            for callback in self.callbacks:
                callback.on_grads(self.run)
            norm = _norm(parameters)
        nn.utils.clip_grads_with_norm_(parameters.values(), self.run.clip, norm)
        return norm


def _check_fused(fused: Optimizer | None, regularizers: Sequence[RegularizerConfig], model: nn.Module) -> None:
    if fused is not None and terms(regularizers, model):
        raise TrainingError(
            "regularisers: those of the delta's tensors are added after the backward pass, in which optimizer "
            f"{fused.config.name} already acts: only kl can go with it",
            code="conflicting-settings",
        )


MOST_SKIPPED = 3
"""So many steps in a row that are not finite are no accident of the data."""


class NotFiniteError(TrainingError):
    """A loss or gradient that is not a number: nothing was changed by its step."""


def _passes(
    run: TrainingState,
    objective: Objective,
    callbacks: Sequence[Callback],
    batch: _Batch,
    passes: Callable[[], AbstractContextManager[None]],
) -> tuple[Sums, list[str]]:
    """The packs of a step forward and backward: (loss and metrics, the rows whose loss is not finite)."""
    # Dropout depends on nothing that went before, so there is no state to save; ranks must not drop the same elements.
    torch.manual_seed(run.seed_for(distributed.rank()))
    sums, bad = Sums(objective), list[str]()
    run.last_pack = False
    with ExitStack() as during:
        for callback in callbacks:
            during.enter_context(callback.during(run))
        during.enter_context(passes())
        statistic = objective.statistic(run.model, batch.mismatched)
        for pack in batch.packs:
            run.pack = pack
            part, log_probs = objective.part(run.model, pack, statistic)
            if not torch.isfinite(part.sum):
                bad += pack.rows_of(~log_probs.isfinite())
                if not distributed.is_sharded(run.model):  # there the other ranks wait for this one in every layer
                    continue
            run.last_pack = pack is batch.packs[-1] and not bad
            part.mean(batch.count, batch.supervised).backward()
            sums.add(part)
    run.pack, run.last_pack = None, False
    return sums, bad


def _norm(parameters: Mapping[str, nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])


@contextmanager
def training_pass(
    model: nn.Module, *, packed: bool, checkpointing: bool = False, offload: bool = False, backend: Backend = TORCH
) -> Iterator[None]:
    """What a recipe says of forward and backward passes, held over both."""
    with ExitStack() as held:
        if packed:
            held.enter_context(packed_attention(model, backend))
        if checkpointing:
            held.enter_context(recomputed_layers(model))
        if offload:
            held.enter_context(offloaded(model))
        yield


@contextmanager
def _memory_explained(model: nn.Module, packs: Sequence[Pack], step: int, checkpointing: bool) -> Iterator[None]:
    """Inside, memory that runs out is a TrainingError that says what took it and which knob to turn."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError, too, is a RuntimeError
        if isinstance(error, RuntimeError) and not any(words in str(error).lower() for words in OUT_OF_MEMORY):
            raise
        largest = max(packs, key=lambda pack: pack.ids.numel())
        rows, layers = len(largest.rows), len(transformer_layers(model))
        kept = "its input" if checkpointing else "what it computed"
        knobs = [] if checkpointing else ["set train.checkpointing: true"]
        knobs += ["lower train.pack_tokens" if rows > 1 else "lower data.max_tokens (the pack is a single row)"]
        knobs += ["load the base in bfloat16 (base.dtype)"] if next(model.parameters()).dtype == torch.float32 else []
        raise TrainingError(
            f"step {step} needs more memory than there is: {str(error).strip().splitlines()[0] if str(error) else ''}\n"
            f"Its largest pack has {largest.ids.numel():,} tokens in {rows} rows, {len(largest.targets):,} of them "
            f"supervised; for each of them every one of {layers} layers keeps {kept} until the backward pass.\n"
            f"To need less: {'; '.join(knobs)}. `graft estimate` says beforehand what a recipe needs",
            code="out-of-memory",
        ) from None


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch's allocators say, on a GPU and on a CPU."""


def _check_gradients(parameters: dict[str, nn.Parameter], still: set[str] | None, done: int) -> set[str]:
    """After the first step every trainable tensor must have a gradient, after the second one that is not all zero.

    (A starts with a zero gradient in LoRA, because B is zero: so two steps.) `still` are those that had a zero gradient
    so far, None before the first step; what learns at one of the two steps only is let pass.
    """
    missing = [name for name, p in parameters.items() if p.grad is None]
    if missing:
        raise TrainingError(
            f"{len(missing)} trainable tensors got no gradient:\n" + numbered(missing), code="no-gradient"
        )
    if done > 1:
        return set()
    zero = {name for name, p in parameters.items() if not p.grad.count_nonzero()}  # type: ignore[union-attr]
    still = zero if still is None else still & zero
    if done == 1 and still:
        raise TrainingError(
            f"{len(still)} trainable tensors had a zero gradient in the first two steps, so they learn nothing:\n"
            + numbered(sorted(still)),
            code="zero-gradient",
        )
    return still


def _not_finite(found: _Found, failures: int) -> str:
    again = f" ({failures} such steps in a row)" if failures > 1 else ""
    remedy = "" if failures > 1 else ", or set train.on_nonfinite: skip to leave such steps out"
    return (
        f"{found.skipped}{again}. It comes from:\n{numbered(list(found.rows))}\nLook at these rows; if they look fine, "
        f"lower train.learning_rate{remedy}. The adapter is as it was before this step"
    )
