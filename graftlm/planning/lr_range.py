"""`graft lr-range RECIPE`: a short run that shows how large a learning rate may be, and how many rows a step is worth.

The rate rises from 1e-6 to 1 by the same factor at every step (a range test: Smith 2015, arXiv:1506.01186, with an
exponential rise) while a fresh delta learns from the recipe's own rows; it is thrown away. What counts of a step is by
how much its loss is below the base's on the very same rows: rows differ far more from each other than a step changes,
and so that difference falls out.

The rate that is suggested lies a factor below the one at which this gain was largest (`BELOW_BEST`): there the steps
already overshoot, and a run makes more of them at one rate than this test does. It is a rate to begin with.

The first steps, whose rates are too small to change anything, also say how much of a step's gradient is noise
(`noise_scale.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from graftlm import distributed
from graftlm.data.batches.pack import Example
from graftlm.deltas import METHODS
from graftlm.display import pages, terminal
from graftlm.errors import TrainingError
from graftlm.evaluation.held_out import held_out_loss
from graftlm.files import writing
from graftlm.hub.load import load_base
from graftlm.model.modes import deltas_off
from graftlm.passes.packing_check import check_packing
from graftlm.planning.noise_scale import NoiseScale, batch_for
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe
from graftlm.system import preserve_global_state
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.kernel_choice import choose_kernels
from graftlm.training.loop import NotFiniteError
from graftlm.training.phases import attach_deltas, make_batches
from graftlm.training.state import TrainingState
from graftlm.training.trainer import Trainer

STEPS = 80
LOWEST, HIGHEST = 1e-6, 1.0

SMOOTHING = 5
"""Steps whose gains are averaged, as many on either side: the rate doubles in four."""

BELOW_BEST = 5.0
"""Measured: docs/log.md."""

DIVERGED = 1.0
"""Above the start, in the unit of the loss: two steps in a row, and the test ends."""

QUIET_SHARE = 0.03
"""Up to this share of the method's own rate a delta is taken to stand still, for the noise of its gradient."""

MIN_GRADIENTS = 8
"""Gradients from which noise is estimated, whatever their rates."""


@dataclass(frozen=True)
class Trial:
    """One step of the test."""

    rate: float
    loss: float
    """The loss of this step's rows, before the step."""
    base_loss: float
    """The loss of the same rows without the delta; 0 for objectives other than supervised training."""


@preserve_global_state()
def lr_range_test(recipe: Recipe, *, console: Console | None = None, count: int = STEPS) -> dict[str, Any]:
    """Try rates on the recipe's rows: what `suggestion` returns, "noise", "batch_rows", and "steps", a Trial each.

    Rates are those of the first delta; others keep their ratio to it. Raises what `train` would raise before its first
    step, and TrainingError under torchrun. Nothing is written.
    """
    if distributed.count() > 1:
        raise TrainingError("graft lr-range is for one process: leave torchrun out", code="one-process-only")
    if recipe.rl is not None:
        raise TrainingError(
            "graft lr-range compares losses of the same rows, and with `rl` no two steps have the same",
            code="unsupported-with-rl",
        )
    console = console or Console(quiet=True)
    config = replace(recipe.train, steps=count, epochs=None, in_turn=False, on_nonfinite="stop")
    recipe = replace(recipe, train=config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    tokenizer = recipe.tokenizer()
    data = prepare_data(recipe, tokenizer, console=console)
    with console.status("loading the base"):
        model: Any = load_base(recipe.base, network=recipe.network).model
    check_packing(model, data.examples, packed=recipe.data.pack, sharing=config.prefix_sharing)
    setup = recipe.setup()
    batches = make_batches(config, data.examples, data.curriculum, data.draws)
    attach_deltas(setup, model, data.examples, batches, statistics_rows=data.statistics_rows)
    _, backend = choose_kernels(setup, model, data.examples, batches, console=console)
    trainer = Trainer(setup, model, data.examples, batches, data.inner_rows, backend=backend)
    first = next(iter(recipe.all_deltas().values()))
    noise = GradientNoise(config.batch_rows, METHODS[first.method].delta.learning_rate)
    trainer.callbacks.append(noise)
    trials: list[Trial] = []
    with terminal.progress(console) as bars:
        bar = bars.add_task("LR range", total=count, now="")
        for step in _steps(recipe, trainer):
            trials.append(step)
            bars.update(bar, advance=1, now=f"rate {step.rate:.1e}  loss {step.loss:.3f}")
    scale = noise.scale.found() if noise.scale.count > 1 else None
    return suggestion(trials) | {
        "noise": scale,
        "batch_rows": scale and batch_for(scale),
        "steps": [vars(step) for step in trials],
    }


def _steps(recipe: Recipe, trainer: Trainer) -> Iterator[Trial]:
    """Steps with rising rates, until the last or until the loss is far above its start or no number any more."""
    model, examples, batches = trainer.model, trainer.examples, trainer.batches
    of_the_base = recipe.loss.name == "supervised"
    tokens, packed = recipe.train.pack_tokens, recipe.data.pack
    rates = [LOWEST * (HIGHEST / LOWEST) ** (i / (len(batches) - 1)) for i in range(len(batches))]
    own = trainer.training.optimizer.param_groups[0]["lr"]
    trainer.phase.schedule = lambda step_number: rates[step_number] / own
    start: float | None = None
    high = 0
    try:
        for step in trainer.steps():
            base_loss = 0.0
            if of_the_base:
                rows = [row for i in batches[step.number - 1] if isinstance(row := examples[i], Example)]
                with deltas_off(model):
                    base_loss = held_out_loss(model, rows, pack_tokens=tokens, packed=packed)
            trial = Trial(rates[step.number - 1], step.loss, base_loss)
            start = trial.loss - trial.base_loss if start is None else start
            high = high + 1 if trial.loss - trial.base_loss - start > DIVERGED else 0
            yield trial
            if high == 2:
                return
    except NotFiniteError:
        return


def suggestion(trials: Sequence[Trial]) -> dict[str, float | None]:
    """What a range test says, None where it did not show:

    learning_rate   to begin with
    best_rate       where the loss was furthest below its start; it had fallen by `fell`
    diverged_rate   from where on it was above its start
    """
    gains = smoothed_gains(trials)
    best, deepest = 0, min(gains)
    for i, gain in enumerate(gains):
        if gain < gains[best]:
            best = i
        elif gains[best] < deepest / 4 and gain > gains[best] / 2:
            break  # a valley, no ripple, and half of it is lost again: what comes after is another story
    above = [step.rate for step, gain in zip(trials, gains, strict=True) if gain > 0 and step.rate > trials[best].rate]
    fell = -gains[best]
    found = fell > MIN_GAIN
    return {
        "learning_rate": float(f"{trials[best].rate / BELOW_BEST:.1e}") if found else None,
        "best_rate": trials[best].rate if found else None,
        "fell": fell if found else None,
        "diverged_rate": above[0] if above else None,
    }


MIN_GAIN = 0.01
"""Less than this, in the unit of the loss, is nothing."""


def smoothed_gains(trials: Sequence[Trial]) -> list[float]:
    """Loss over that of the start, on the same rows where that is known, averaged over SMOOTHING steps."""
    raw = [step.loss - step.base_loss for step in trials]
    start = sum(raw[:SMOOTHING]) / len(raw[:SMOOTHING])
    half = SMOOTHING // 2
    parts = [raw[max(0, i - half) : i + half + 1] for i in range(len(raw))]
    return [sum(part) / len(part) - start for part in parts]


class GradientNoise(Callback):
    """Adds up the gradients of the first steps, while the delta all but stands still."""

    def __init__(self, rows: int, usual_rate: float) -> None:
        super().__init__(CallbackConfig(name="noise"))
        self.batch_rows, self.max_rate = rows, QUIET_SHARE * usual_rate
        self.scale = NoiseScale()

    def on_grads(self, training: TrainingState) -> None:
        if training.done < MIN_GRADIENTS or training.optimizer.param_groups[0]["lr"] <= self.max_rate:
            gradients = (p.grad for p in training.parameters().values() if p.grad is not None)
            self.scale.add(gradients, self.batch_rows)


# Output ----------------------------------------------------------------------------------------------------------


def lines(found: dict[str, Any], recipe: Recipe) -> list[str]:
    """What was found, in words."""
    texts = []
    if found["learning_rate"] is None:
        texts.append("learning rate  none that was tested made the loss fall")
    else:
        texts.append(
            f"learning rate  {found['learning_rate']:.1e} to begin with: the loss fell most, by {found['fell']:.3f}, "
            f"at {found['best_rate']:.1e}"
        )
    if found["diverged_rate"] is not None:
        texts.append(f"               and was above its start from {found['diverged_rate']:.1e} on")
    noise = found["noise"]
    if noise is None:
        texts.append("batch          no gradient to look at: the optimizer updates within the backward pass")
    elif noise["noise_rows"] is None:
        texts.append(
            f"batch          more than {noise['least_rows']} rows: in so many there was nothing but noise to see"
        )
    else:
        texts.append(
            f"batch          about {found['batch_rows']} rows a step, judging by {noise['rows']}: at the start a "
            f"gradient over {noise['noise_rows']:.1f} is half noise, later over more. Here: {recipe.train.batch_rows}"
        )
    return texts


def write(file: Path, found: dict[str, Any], recipe: Recipe, *, title: str) -> None:
    """The page of a test. Raises OutputError where it cannot be written."""
    page = pages.page(
        "table.html.jinja",
        title=title,
        notes=lines(found, recipe),
        picture=_picture(found),
        tables=[
            ("steps", ["rate", "loss", "base_loss"], [[f"{v:.4g}" for v in step.values()] for step in found["steps"]])
        ],
        damaged={},
    )
    with writing(file):
        file.write_text(page, encoding="utf-8")


def _picture(found: dict[str, Any]) -> str:
    trials = [Trial(**step) for step in found["steps"]]
    rates = [step.rate for step in trials]
    start = sum(step.loss - step.base_loss for step in trials[:SMOOTHING]) / len(trials[:SMOOTHING])
    figure, axis = pages.figure()
    axis.plot(rates, [s.loss - s.base_loss - start for s in trials], color="#2da44e", linewidth=1, alpha=0.4)
    axis.plot(rates, smoothed_gains(trials), color="#2da44e", linewidth=2)
    for key, color in (("learning_rate", "#0b6bcb"), ("best_rate", "#8b8f96"), ("diverged_rate", "#cf222e")):
        if found[key] is not None:
            axis.axvline(found[key], color=color, linestyle=":", label=f"{key.replace('_', ' ')} {found[key]:.1e}")
    axis.axhline(0, color="#d8dbe0", linewidth=1)
    axis.set(xscale="log", xlabel="learning rate", ylabel="loss less that of the start")
    if found["fell"]:  # what runs away would hide all else
        axis.set_ylim(-1.5 * found["fell"], 1.5 * found["fell"])
    axis.legend(fontsize="small")
    return pages.svg(figure)
