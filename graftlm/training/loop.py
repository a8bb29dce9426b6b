"""The training loop: a step reads top to bottom.

    train_step = TrainStep(training, loss, schedule, clip)
    for packs in batches:
        step = train_step.step(packs)    # logging, evaluating, saving are ordinary statements of the caller

The loss of a step is the sum over the supervised tokens (or pairs, or answers: `losses`) of all its packs, divided by
their count: how a batch is split into packs, and those among processes, changes memory and time, not the result.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm import distributed
from graftlm.data.batches.pack import Pack
from graftlm.errors import TrainingError, numbered
from graftlm.losses import LossConfig
from graftlm.model.registry import penalty, trainable
from graftlm.model.sites import transformer_layers
from graftlm.training.callback import Callback, Optimizer, check_callbacks, fused_optimizer
from graftlm.training.objective import Objective, Sums
from graftlm.training.passes import Passes
from graftlm.training.regularizers import RegularizerConfig, check_regularizers, kl_to_base, terms, weighted
from graftlm.training.state import TrainingState


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. `loss` is what the objective says, before the step and without penalties: of
    supervised training nats per supervised token, of others what its file says, a pair or an answer."""

    number: int
    """The number of the batch, from 1."""
    done: int
    """Optimizer steps so far: `number` less what was skipped."""
    loss: float
    tokens: int
    """Tokens of the rows."""
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


@dataclass
class TrainStep:
    """Optimizer steps on the deltas of a model, a batch of packs each: this rank's, where there are several.

    Raises TrainingError for callbacks and regularizers that do not fit what is trained, and calls `on_start` of the
    callbacks.
    """

    training: TrainingState
    """The model, its optimizer, and how far they are; callbacks see it."""
    loss: LossConfig | str
    schedule: Callable[[int], float]
    """The factor on the learning rates of step 0, 1, ..."""
    clip: float
    """The largest norm of the gradient of a step."""
    callbacks: Sequence[Callback] = ()
    regularizers: Sequence[RegularizerConfig] = ()
    """A term that is added to the loss and to the metrics of a step."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    passes: Passes = field(default_factory=Passes)

    def __post_init__(self) -> None:
        self.model, self.optimizer = self.training.model, self.training.optimizer
        self.objective = Objective(self.loss, kl_to_base(self.regularizers))
        self.fused = fused_optimizer(self.callbacks)
        check_regularizers(self.regularizers, self.model)
        check_callbacks(self.callbacks, self.training)
        for callback in self.callbacks:
            callback.on_start(self.training)
        _check_fused(self.fused, self.regularizers, self.model)

    def over(self, batches: Iterable[Sequence[Pack]]) -> Iterator[Step]:
        """A step for each batch."""
        for packs in batches:
            yield self.step(packs)

    def step(self, packs: Sequence[Pack]) -> Step:
        """One optimizer step.

        Raises TrainingError, before anything is changed, for a loss or gradient that is not finite (naming the rows),
        for a trainable tensor that gets no gradient (naming the tensor) and where memory is not enough. With
        `on_nonfinite="skip"` a step that is not finite changes nothing and the next batch follows; after three in a row
        it is an error again.
        """
        started, training, batch = time.perf_counter(), self.training, _Batch(self.objective, packs)
        number = training.seen + 1
        metrics_of_rows, training.metrics = training.metrics, {}
        if batch.count:
            self._set_learning_rates()
            with _memory_explained(self.model, batch.packs, number, self.passes.checkpointing):
                found = self._gradient(batch, number)
                if not found.skipped:
                    self.optimizer.step()
            self._count(found)
            self.optimizer.zero_grad(set_to_none=True)
        else:  # of answers that the model gave itself, all were as good as each other
            found, training.failures = _Found(skipped=f"step {number} has nothing to learn from"), 0
        training.seen = number
        events, training.events = tuple(training.events), []
        return Step(
            number=number,
            done=training.done,
            loss=found.loss,
            tokens=int(batch.tokens),
            computed_tokens=int(batch.computed),
            supervised_tokens=batch.supervised,
            metrics={**metrics_of_rows, **found.metrics},
            grad_norm=found.norm,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            wall_s=time.perf_counter() - started,
            skipped=found.skipped,
            rows=found.rows,
            events=events,
        )

    def _set_learning_rates(self) -> None:
        factor = self.schedule(self.training.done)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("largest_lr", group["lr"]) * factor

    def _count(self, found: "_Found") -> None:
        """Count the step, and let callbacks act after it; NotFiniteError where it must not be skipped."""
        training = self.training
        if found.skipped:
            failures = training.failures + 1
            stops = self.on_nonfinite == "stop" or failures == MOST_SKIPPED
            training.failures = 0 if stops else failures  # a state that is saved now may go on, as `--resume` does
            if stops:
                raise NotFiniteError(_not_finite(found, failures), code="not-finite")
            return
        training.failures = 0
        training.done += 1
        for callback in self.callbacks:
            callback.on_step(training)

    def _gradient(self, batch: "_Batch", number: int) -> "_Found":
        """Put the gradient of the step into `.grad`, clipped and the same on every rank; or say why it is not
        finite."""
        training, parameters = self.training, trainable(self.model)
        training.clip, training.norm, training.divisor = self.clip, math.nan, batch.count
        for callback in self.callbacks:
            training.divisor = callback.divisor(training, training.divisor)
        for training.rehearsal in (True, False) if self.fused is not None and self.fused.rehearses else (False,):
            sums, bad = self._passes(batch)
            if bad or (training.rehearsal and not math.isfinite(training.norm)):
                break
        total, metrics = sums.totals()
        if distributed.totals(len(bad))[0]:
            return _Found(skipped=f"the loss of step {number} is not finite", rows=tuple(distributed.gathered(bad)))
        metrics |= self._add_penalties()
        distributed.sum_gradients(parameters.values())
        norm = torch.tensor(training.norm) if self.fused is not None else self._clipped(parameters)
        if torch.isfinite(norm):
            return _Found(total / batch.count, float(norm), metrics)
        row_places = distributed.gathered([row for pack in batch.packs for row in pack.rows])
        return _Found(skipped=f"the gradient of step {number} is not finite", rows=tuple(dict.fromkeys(row_places)))

    def _passes(self, batch: "_Batch") -> tuple[Sums, list[str]]:
        """The packs forward and backward: (loss and metrics, the rows whose loss is not finite)."""
        training, objective = self.training, self.objective
        # Dropout depends on nothing that went before, so no state is saved for it. Ranks must drop other elements.
        torch.manual_seed(training.seed_for(distributed.rank()))
        sums, bad = Sums(objective), list[str]()
        training.last_pack = False
        with ExitStack() as during:
            for callback in self.callbacks:
                during.enter_context(callback.during(training))
            during.enter_context(self.passes.through(self.model))
            statistic = objective.statistic(self.model, batch.mismatched)
            for pack in batch.packs:
                training.pack = pack
                part, log_probs = objective.part(self.model, pack, statistic)
                if not torch.isfinite(part.sum):
                    bad += pack.rows_of(~log_probs.detach().isfinite())
                    if not distributed.is_sharded(self.model):  # there the other ranks wait for this one in every layer
                        continue
                training.last_pack = pack is batch.packs[-1] and not bad
                if not any(callback.on_pack(training, pack, part, log_probs) for callback in self.callbacks):
                    part.mean(training.divisor, batch.supervised).backward()
                sums.add(part)
                del part, log_probs  # with their graph, which `on_pack` may have retained
        training.pack, training.last_pack = None, False
        return sums, bad

    def _add_penalties(self) -> dict[str, float]:
        """The gradients of what is a function of the deltas alone: once, not once a rank. Its values, by name."""
        values, own = terms(self.regularizers, self.model), penalty(self.model)
        extras = [*weighted(values), *([] if own is None else [own])]
        if distributed.first() and extras:
            torch.stack(extras).sum().backward()
        return {name: float(value.detach()) for name, (_, value) in values.items()}

    def _clipped(self, parameters: dict[str, nn.Parameter]) -> Tensor:
        """Let callbacks see the gradient, and clip it; its norm before that."""
        self.training.zero_gradients = _check_gradients(parameters, self.training)
        norm = _norm(parameters)
        if self.callbacks and torch.isfinite(norm):  # callbacks remember what they see
            for callback in self.callbacks:
                callback.on_grads(self.training)
            norm = _norm(parameters)
        nn.utils.clip_grads_with_norm_(parameters.values(), self.clip, norm)
        return norm


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


def _check_fused(fused: Optimizer | None, regularizers: Sequence[RegularizerConfig], model: nn.Module) -> None:
    if fused is not None and terms(regularizers, model):
        raise TrainingError(
            "regularisers: those of the delta's tensors are added after the backward pass, in which optimizer "
            f"{fused.config.name} already acts: only kl can go with it",
            code="conflicting-settings",
        )


MOST_SKIPPED = 3
"""Training stops after so many steps in a row that are not finite: they are no accident of the data."""


class NotFiniteError(TrainingError):
    """A loss or gradient that is not a number: nothing was changed by its step."""


def _norm(parameters: Mapping[str, nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])


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
        saved_text = "its input" if checkpointing else "what it computed"
        knobs = [] if checkpointing else ["set train.checkpointing: true"]
        knobs += ["lower train.pack_tokens" if rows > 1 else "lower data.max_tokens (the pack is a single row)"]
        knobs += ["load the base in bfloat16 (base.dtype)"] if next(model.parameters()).dtype == torch.float32 else []
        raise TrainingError(
            f"step {step} needs more memory than there is: {str(error).strip().splitlines()[0] if str(error) else ''}\n"
            f"Its largest pack has {largest.ids.numel():,} tokens in {rows} rows, {len(largest.targets):,} of them "
            f"supervised; for each of them every one of {layers} layers keeps {saved_text} until the backward pass.\n"
            f"To need less: {'; '.join(knobs)}. `graft estimate` says beforehand what a recipe needs",
            code="out-of-memory",
        ) from None


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch's allocators say, on a GPU and on a CPU."""


def _check_gradients(parameters: dict[str, nn.Parameter], training: TrainingState) -> set[str]:
    """After the first step every trainable tensor must have a gradient, after the second one that is not all zero.

    (A starts with a zero gradient in LoRA, because B is zero: so two steps.) Returns those that had a zero gradient so
    far; what learns at one of the two steps only is let pass.
    """
    done = training.done
    missing = [name for name, p in parameters.items() if p.grad is None]
    if missing:
        raise TrainingError(
            f"{len(missing)} trainable tensors got no gradient:\n" + numbered(missing), code="no-gradient"
        )
    if done > 1:
        return set()
    zero = {name for name, p in parameters.items() if not p.grad.count_nonzero()}  # type: ignore[union-attr]
    still = zero & (training.zero_gradients or set()) if done else zero
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
