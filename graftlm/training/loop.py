"""The training loop: a generator of steps that reads top to bottom.

    for step in steps(model, batches, loss, optimiser, schedule):
        ...                              # logging, evaluating, saving are ordinary statements of the caller

The loss of a step is the sum over the supervised tokens of all its packs, divided by their count: how a batch is split
into packs, and those among processes (`ranks`), changes memory and time, not the result.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config import Count, Flag, PositiveCount, PositiveRate, Rate, Share, config
from graftlm.data.pack import Pack
from graftlm.errors import TrainingError, numbered
from graftlm.losses import LOSSES
from graftlm.model.attach import penalty, trainable
from graftlm.model.forward import log_probs, packed_attention
from graftlm.model.recompute import offloaded, recomputed_layers
from graftlm.model.sites import transformer_layers
from graftlm.training import ranks


@config
class TrainConfig:
    steps: PositiveCount | None = None
    """Optimiser steps; give these or `epochs`."""
    epochs: PositiveRate | None = None
    """Passes over the training rows, 1 if neither is given."""
    batch_rows: PositiveCount = 8
    """Rows of one optimiser step."""
    learning_rate: PositiveRate | None = None
    """The largest learning rate; by default the one that was measured as good for each delta's method."""
    in_turn: Flag = False
    """Train several deltas one after another, each for an equal share of the steps, instead of together."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises; it then falls to zero along half a cosine."""
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
    compile: Flag = False
    """Let torch.compile fuse norms, gated units and rotary embeddings: a tenth faster, after some 10 s at the start.
    Needs `data.pack`, and on a CPU a C++ compiler."""
    seed: Count = 0
    threads: PositiveCount | None = None
    """CPU threads; by default torch's own choice."""
    shard: Literal["none", "fsdp"] = "none"
    """With several processes, what each holds of the frozen base: all of it, or by fsdp (FSDP2) its part."""


@dataclass(frozen=True)
class Step:
    """What one optimiser step did. `loss` is in nats per supervised token, before the step and without penalties."""

    number: int
    loss: float
    tokens: int
    """Of the rows."""
    computed_tokens: int
    """Less than `tokens` where rows of a pack share their beginnings."""
    supervised_tokens: float
    grad_norm: float
    learning_rate: float
    wall_s: float


def steps(
    model: nn.Module,
    batches: Iterable[Sequence[Pack]],
    *,
    loss: str,
    optimiser: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    clip: float,
    packed: bool = True,
    checkpointing: bool = False,
    offload: bool = False,
    compiled: bool = False,
) -> Iterator[Step]:
    """Train the model's deltas, one optimiser step for each batch of packs: this rank's, where there are several.

    Raises TrainingError, before anything is changed by that step, for a loss or gradient that is not finite (naming
    the rows), for a trainable tensor that gets no gradient (naming the tensor) and where memory is not enough.
    """
    parameters = trainable(model)
    unmoved = set(parameters)
    rates = [group["lr"] for group in optimiser.param_groups]
    for number, packs in enumerate(batches):
        started = time.perf_counter()
        count, tokens, computed = ranks.totals(
            sum(float(pack.weights.sum()) for pack in packs),
            sum(pack.row_tokens for pack in packs),
            sum(pack.ids.numel() for pack in packs),
        )
        total, bad = 0.0, list[str]()
        explained = partial(_memory_explained, model, packs, number + 1, checkpointing)
        held = training_pass(model, packed=packed, checkpointing=checkpointing, offload=offload, compiled=compiled)
        with explained(), held:
            for pack in packs:
                policy = log_probs(model, pack)
                part = LOSSES[loss](policy, None, pack.weights)
                if not torch.isfinite(part.sum):  # the other ranks wait for this one, so it goes on to the end
                    bad += _rows_of(pack, ~policy.isfinite())
                (part.sum / count).backward()
                total += float(part.sum.detach())
        total, failed = ranks.totals(total, len(bad))
        if failed:
            raise TrainingError(_not_finite(f"the loss of step {number + 1}", ranks.gathered(bad)))
        if ranks.first() and (extra := penalty(model)) is not None:  # once, not once a rank
            extra.backward()
        ranks.sum_gradients(parameters.values())
        _check_gradients(parameters, unmoved, number)
        norm = nn.utils.clip_grad_norm_(parameters.values(), clip)
        if not torch.isfinite(norm):
            rows = ranks.gathered([row for pack in packs for row in pack.rows])
            raise TrainingError(_not_finite(f"a gradient of step {number + 1}", list(dict.fromkeys(rows))))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(number)
        with explained():
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        yield Step(
            number=number + 1,
            loss=total / count,
            tokens=int(tokens),
            computed_tokens=int(computed),
            supervised_tokens=count,
            grad_norm=float(norm),
            learning_rate=optimiser.param_groups[0]["lr"],
            wall_s=time.perf_counter() - started,
        )


@contextmanager
def training_pass(
    model: nn.Module, *, packed: bool, checkpointing: bool = False, offload: bool = False, compiled: bool = False
) -> Iterator[None]:
    """What a recipe says of forward and backward passes, held over both."""
    with ExitStack() as held:
        if packed:
            held.enter_context(packed_attention(model, compiled=compiled))
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
        knobs += ["keep the base in bf16 (base.store)"] if next(model.parameters()).dtype == torch.float32 else []
        raise TrainingError(
            f"step {step} needs more memory than there is: {str(error).strip().splitlines()[0] if str(error) else ''}\n"
            f"Its largest pack has {largest.ids.numel():,} tokens in {rows} rows, {len(largest.targets):,} of them "
            f"supervised; for each of them every one of {layers} layers keeps {kept} until the backward pass.\n"
            f"To need less: {'; '.join(knobs)}. `graft plan` says beforehand what a recipe needs"
        ) from None


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch's allocators say, on a GPU and on a CPU."""


def _check_gradients(parameters: dict[str, nn.Parameter], unmoved: set[str], number: int) -> None:
    """After the first step every trainable tensor must have a gradient, after the second one that is not all zero.

    (A starts with a zero gradient in LoRA, because B is zero: so two steps.)
    """
    missing = [name for name, p in parameters.items() if p.grad is None]
    if missing:
        raise TrainingError(f"{len(missing)} trainable tensors got no gradient:\n" + numbered(missing))
    if number < 2:
        unmoved -= {name for name, p in parameters.items() if name in unmoved and bool(p.grad.count_nonzero())}  # type: ignore[union-attr]
    if number == 1 and unmoved:
        raise TrainingError(
            f"{len(unmoved)} trainable tensors had a zero gradient in the first two steps, so they learn nothing:\n"
            + numbered(sorted(unmoved))
        )


def _rows_of(pack: Pack, bad: Tensor) -> list[str]:
    """The rows of a pack in which the loss triples marked `bad` lie."""
    ends = torch.tensor(pack.lengths).cumsum(0)
    segments = torch.bucketize(pack.hidden_rows.cpu()[bad.cpu()], ends, right=True)
    named = [row for i in sorted(set(segments.tolist())) for row in pack.where[i]]
    return list(dict.fromkeys(named)) or pack.rows


def _not_finite(what: str, rows: list[str]) -> str:
    return (
        f"{what} is not finite. It comes from:\n{numbered(rows)}\nLook at these rows; if they are well, lower "
        "train.learning_rate. The adapter is as it was before this step"
    )
