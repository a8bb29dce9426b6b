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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftlm import distributed
from graftlm.config.schema import Count, Flag, PositiveCount, PositiveRate, Rate, Share, config
from graftlm.data.batches.pack import Pack
from graftlm.errors import TrainingError, numbered
from graftlm.kernels.backend import TORCH, Backend, Kernels
from graftlm.losses import LossConfig
from graftlm.model.layers.registry import penalty, trainable
from graftlm.model.layers.sites import transformer_layers
from graftlm.model.passes.packed_attention import packed_attention
from graftlm.model.passes.recompute import offloaded, recomputed_layers
from graftlm.training.callback import Callback, check_callbacks, fused_optimizer
from graftlm.training.guards import EarlyStopping
from graftlm.training.objective import Objective, Sums
from graftlm.training.regularizers import RegularizerConfig, check_regularizers, kl_to_base, terms, weighted
from graftlm.training.schedule import Schedule, learning_rate_factor
from graftlm.training.state import TrainingState


@config
class TrainConfig:
    """The steps of a run: how many, how large, at which rate, on which machine. A wrong value raises a ValueError."""

    steps: PositiveCount | None = None
    """Optimizer steps; give these or `epochs`."""
    epochs: PositiveRate | None = None
    """Passes over the training rows, 1 if neither is given."""
    batch_rows: PositiveCount = 8
    """Rows of one optimizer step."""
    learning_rate: PositiveRate | None = None
    """The largest learning rate; by default that of each delta's method (`graft methods` lists them): the smallest that
    gained 95 % of what the best one did on the job of benchmarks/methods. `graft lr-range` tests rates on your rows."""
    in_turn: Flag = False
    """Train several deltas one after another, each for an equal share of the steps, instead of together."""
    schedule: Schedule = "cosine"
    """How the learning rate goes on after the warm-up: to zero along half a cosine or a line (`linear`), not at all
    (`constant`), or not at all until the last `decay` of the steps and then to zero along a line
    (`warmup-stable-decay`)."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises."""
    decay: Share | None = None
    """Share of the steps over which the learning rate of `schedule: warmup-stable-decay` falls; 0.2 where nothing is
    given. The other schedules do not read it."""
    weight_decay: Rate = 0.0
    clip: PositiveRate = 1.0
    """Largest norm of the gradient of all trainable tensors together."""
    pack_tokens: PositiveCount = 1024
    """Tokens of one forward pass: memory grows with it, the result does not change."""
    prefix_sharing: Flag = True
    """Compute what rows of a pack begin with alike once, for all of them: the loss and its gradients are the same."""
    checkpointing: Flag = False
    """Keep each layer's input alone and run the layer again in the backward pass: less memory, about a third slower."""
    offload: Flag = False
    """Keep activations in the machine's memory instead of the GPU's; refused on a CPU, where they are there already."""
    kernels: Kernels = "auto"
    """What computes attention, layers with low-rank factors, norms, gated units and rotary embeddings. `ours`: kernels
    for a CPU and a base in bf16, which need a C++ compiler. `torch`: torch's own operations. `compiled`: torch.compile
    for norms, gates and rotary embeddings, torch for the rest. `auto`: the fastest of them for each shape, measured at
    the first run of a base on a machine; kernels that cannot be built are left out, and the start says so. The others
    are an error where they cannot compute, and need `data.pack`."""

    def __post_init__(self) -> None:
        if self.decay is not None and self.schedule != "warmup-stable-decay":
            raise ValueError(f"decay is for schedule: warmup-stable-decay; schedule: {self.schedule} does not read it")
        if self.schedule == "warmup-stable-decay" and self.warmup + self.decay_share > 1:
            raise ValueError(f"warmup {self.warmup:g} and decay {self.decay_share:g} are more than the whole run")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.early_stopping and self.in_turn:
            raise ValueError("early_stopping knows one end, and in_turn has several: leave one out")

    def conflict_in(self, recipe: Any) -> str:
        """Why these keys do not fit other parts of a recipe, or an empty text."""
        if self.early_stopping and not recipe.data.held_out:
            return "train.early_stopping looks at held-out rows: set data.held_out"
        if self.kernels in ("ours", "compiled") and not recipe.data.pack:
            return (
                f"train.kernels: {self.kernels} computes packs only: set `data: {{pack: true}}` or train.kernels: auto"
            )
        return ""

    @property
    def decay_share(self) -> float:
        """`decay`, or its default."""
        return 0.2 if self.decay is None else self.decay

    def factor(self, steps: int) -> Callable[[int], float]:
        """The factor on the learning rate of each of so many steps."""
        warmup_steps, decay_steps = round(self.warmup * steps), round(self.decay_share * steps)
        return learning_rate_factor(self.schedule, steps=steps, warmup_steps=warmup_steps, decay_steps=decay_steps)

    REPLACED: ClassVar[Mapping[str, str]] = {"compile": "kernels (auto, ours, torch or compiled)"}
    """Keys of earlier versions, and what took their place."""
    save_every: PositiveCount = 50
    """Steps between two checkpoints, from which `--resume` goes on; one is saved at the end and at Ctrl-C too."""
    keep: PositiveCount = 2
    """How many of the last checkpoints are kept."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: stop, or leave the step out, name its rows and go on; after three in a
    row it stops in either case. Nothing is changed by such a step."""
    on_spike: Literal["tell", "return"] = "tell"
    """At a loss far above those before it: say so, or go back to the last checkpoint and leave out the batches since
    then."""
    early_stopping: EarlyStopping | None = None
    """Stop when the loss of the held-out rows falls no more, and keep the state in which it was lowest."""
    seed: Count = 0
    threads: PositiveCount | None = None
    """CPU threads; by default torch's own choice."""
    shard: Literal["none", "fsdp"] = "none"
    """With several processes, what each holds of the frozen base: all of it, or by fsdp (FSDP2) its part."""


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
    objective = Objective(loss, kl_to_base(regularizers))
    check_regularizers(regularizers, model)
    run = training or TrainingState(model=model, deltas={}, optimizer=optimizer, total=0, seed=0)
    check_callbacks(callbacks, run)
    for callback in callbacks:
        callback.on_start(run)
    fused = fused_optimizer(callbacks)
    if fused and terms(regularizers, model):
        raise TrainingError(
            "regularisers: those of the delta's tensors are added after the backward pass, in which optimizer "
            f"{fused.config.name} already acts: only kl can go with it",
            code="conflicting-settings",
        )
    rehearsed = fused is not None and fused.rehearses
    still: set[str] | None = None if run.done == 0 else set()
    in_a_row = 0
    for number, packs in enumerate(batches, start=seen):
        started = time.perf_counter()
        parameters = trainable(model)
        mismatched = [pack for pack in packs if pack.mismatched]
        packs = [pack for pack in packs if not pack.mismatched]
        count, supervised, tokens, computed = distributed.totals(
            sum(map(objective.count, packs)),
            sum(float(pack.weights.sum()) for pack in packs),
            sum(pack.row_tokens for pack in packs),
            sum(pack.ids.numel() for pack in (*packs, *mismatched)),
        )
        extra_metrics, run.metrics = run.metrics, {}
        if not count:  # answers that the model gave itself may all be as good as each other
            in_a_row, events, run.events = 0, tuple(run.events), []
            yield Step(
                number=number + 1,
                done=run.done,
                loss=math.nan,
                tokens=0,
                computed_tokens=0,
                supervised_tokens=0.0,
                grad_norm=math.nan,
                learning_rate=optimizer.param_groups[0]["lr"],
                wall_s=time.perf_counter() - started,
                metrics=extra_metrics,
                skipped=f"step {number + 1} has nothing to learn from",
                events=events,
            )
            continue
        rate = schedule(run.done)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("largest_lr", group["lr"]) * rate
        explained = partial(_memory_explained, model, packs, number + 1, checkpointing)
        run.clip, run.norm = clip, math.nan
        passes = partial(training_pass, model, packed=packed, checkpointing=checkpointing, offload=offload)
        with explained():
            for run.rehearsal in (True, False) if rehearsed else (False,):
                sums, bad = _passes(
                    run, objective, callbacks, packs, mismatched, (count, supervised), partial(passes, backend=backend)
                )
                if bad or (run.rehearsal and not math.isfinite(run.norm)):
                    break
        total, metrics = sums.totals()
        (failed,) = distributed.totals(len(bad))
        wrong, rows = "loss" if failed else "", distributed.gathered(bad) if failed else []
        norm = torch.tensor(math.nan)
        if not failed:
            added = terms(regularizers, model)
            metrics |= {name: float(value.detach()) for name, (_, value) in added.items()}
            extras = [*weighted(added), *([] if (own := penalty(model)) is None else [own])]
            if distributed.first() and extras:  # once, not once a rank
                torch.stack(extras).sum().backward()
            distributed.sum_gradients(parameters.values())
            if not fused:
                still = _check_gradients(parameters, still, run.done)
            norm = torch.tensor(run.norm) if fused else _norm(parameters)
            if callbacks and not fused and torch.isfinite(norm):  # callbacks remember what they see
                for callback in callbacks:
                    callback.on_grads(run)
                norm = _norm(parameters)
            if not fused:
                nn.utils.clip_grads_with_norm_(parameters.values(), clip, norm)
            if not torch.isfinite(norm):
                named = distributed.gathered([row for pack in packs for row in pack.rows])
                wrong, rows = "gradient", list(dict.fromkeys(named))
        if wrong:
            in_a_row += 1
            what = f"the {wrong} of step {number + 1}"
            if on_nonfinite == "stop" or in_a_row == MOST_SKIPPED:
                raise NotFiniteError(_not_finite(what, rows, in_a_row), code="not-finite")
            norm = torch.tensor(math.nan)
        else:
            in_a_row = 0
            with explained():
                optimizer.step()
            run.done += 1
            for callback in callbacks:
                callback.on_step(run)
        optimizer.zero_grad(set_to_none=True)
        events, run.events = tuple(run.events), []
        yield Step(
            number=number + 1,
            done=run.done,
            loss=math.nan if wrong else total / count,
            tokens=int(tokens),
            computed_tokens=int(computed),
            supervised_tokens=supervised,
            metrics=extra_metrics if wrong else {**extra_metrics, **metrics},
            grad_norm=float(norm),
            learning_rate=optimizer.param_groups[0]["lr"],
            wall_s=time.perf_counter() - started,
            skipped=f"{what} is not finite" if wrong else "",
            rows=tuple(rows),
            events=events,
        )


MOST_SKIPPED = 3
"""So many steps in a row that are not finite are no accident of the data."""


class NotFiniteError(TrainingError):
    """A loss or gradient that is not a number: nothing was changed by its step."""


def _passes(
    run: TrainingState,
    objective: Objective,
    callbacks: Sequence[Callback],
    packs: Sequence[Pack],
    mismatched: Sequence[Pack],
    counts: tuple[float, float],
    held: Callable[[], AbstractContextManager[None]],
) -> tuple[Sums, list[str]]:
    """The packs of a step forward and backward: (loss and metrics, the rows whose loss is not finite)."""
    # Dropout depends on nothing that went before, so there is no state to save; ranks must not drop the same elements.
    torch.manual_seed(run.seed_for(distributed.rank()))
    sums, bad = Sums(objective), list[str]()
    run.last_pack = False
    with ExitStack() as during:
        for callback in callbacks:
            during.enter_context(callback.during(run))
        during.enter_context(held())
        statistic = objective.statistic(run.model, mismatched)
        for pack in packs:
            run.pack = pack
            part, log_probs = objective.part(run.model, pack, statistic)
            if not torch.isfinite(part.sum):
                bad += pack.rows_of(~log_probs.isfinite())
                if not distributed.is_sharded(run.model):  # there the other ranks wait for this one in every layer
                    continue
            run.last_pack = pack is packs[-1] and not bad
            part.mean(*counts).backward()
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


def _not_finite(what: str, rows: list[str], in_a_row: int) -> str:
    again = f", the {in_a_row}. step in a row of which that is true" if in_a_row > 1 else ""
    remedy = "" if in_a_row > 1 else ", or set train.on_nonfinite: skip to leave such steps out"
    return (
        f"{what} is not finite{again}. It comes from:\n{numbered(rows)}\nLook at these rows; if they are well, lower "
        f"train.learning_rate{remedy}. The adapter is as it was before this step"
    )
