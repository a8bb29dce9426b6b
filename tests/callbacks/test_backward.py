"""A callback in the place of the backward pass: per-row clipped gradients, and the divisor of a step."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.data.batches.pack import Example, Pack, collate, pack
from graftlm.losses import LossSum
from graftlm.model.registry import trainable
from graftlm.optim import OPTIMIZERS
from graftlm.passes.forward import log_probs
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState
from tests.callbacks.tables import with_optimizer
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples

LARGEST = 5.0
"""Some rows have a gradient with a larger norm, others have not."""

EXPECTED_ROWS = 16.0


class PerRow(Callback):
    """The gradient of each row, clipped to a norm, is summed up; the sum is divided by a fixed number of rows."""

    def __init__(self, name: str = "per-row") -> None:
        super().__init__(CallbackConfig(name=name))
        self.left: dict[str, Tensor] = {}
        self.norms: list[float] = []

    def divisor(self, training: TrainingState, count: float) -> float:
        return EXPECTED_ROWS

    def on_pack(self, training: TrainingState, pack: Pack, part: LossSum, log_probs: Tensor) -> bool:
        parameters = list(trainable(training.model).values())
        segments = pack.segment_of.to(log_probs.device)
        for segment in segments.unique():
            loss = -(log_probs * pack.weights)[segments == segment].sum()
            gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
            norm = torch.stack([g.norm() for g in gradient]).norm()
            self.norms.append(float(norm))
            for parameter, g in zip(parameters, gradient, strict=True):
                own = g * (LARGEST / norm).clamp(max=1) / training.divisor
                parameter.grad = own if parameter.grad is None else parameter.grad + own
        return True

    def on_grads(self, training: TrainingState) -> None:
        self.left = {name: p.grad.clone() for name, p in trainable(training.model).items() if p.grad is not None}


def clipped_rows(model: Any, rows: Sequence[Example]) -> dict[str, Tensor]:
    """The sum of the clipped gradients of rows, each in a pass of its own through the model's own attention."""
    total = {name: torch.zeros_like(p) for name, p in trainable(model).items()}
    for row in rows:
        alone = collate([row])
        loss = -(log_probs(model, alone) * alone.weights).sum()
        model.zero_grad()
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
        norm = torch.sqrt(sum(g.square().sum() for g in gradient.values()))  # type: ignore[arg-type]
        for name, g in gradient.items():
            total[name] += g if norm <= LARGEST else g * LARGEST / norm
    model.zero_grad()
    return total


@pytest.mark.parametrize("tokens", [1, 60, 1000])
def test_per_row_gradients_are_clipped_and_divided_by_what_the_callback_says(tokens: int) -> None:
    rows, model = examples(8), perturbed("lora", tiny_model())
    wanted = clipped_rows(model, rows)
    callback = PerRow()
    (step,) = run(training(model, []), [callback], [pack(rows, tokens, share=False)])
    assert len(callback.norms) == len(rows)
    assert min(callback.norms) < LARGEST < max(callback.norms)
    assert callback.left.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(callback.left[name], gradient / EXPECTED_ROWS, rtol=1e-4, atol=1e-7)
    total = torch.sqrt(sum((g / EXPECTED_ROWS).square().sum() for g in wanted.values()))  # type: ignore[arg-type]
    assert step.grad_norm == pytest.approx(float(total), rel=1e-4)


def test_the_loss_that_is_reported_stays_the_mean() -> None:
    batch = [pack(examples(8), 60)]
    (plain,) = run(training(perturbed("lora", tiny_model()), []), [], batch)
    (step,) = run(training(perturbed("lora", tiny_model()), []), [PerRow()], batch)
    assert step.loss == plain.loss


class Twice(Callback):
    """The divisor alone: the backward pass stays."""

    def __init__(self) -> None:
        super().__init__(CallbackConfig(name="twice"))
        self.counts: list[float] = []

    def divisor(self, training: TrainingState, count: float) -> float:
        self.counts.append(count)
        return 2 * count


def test_the_divisor_of_a_step_divides_its_gradient() -> None:
    """Twice the number of supervised tokens: half the gradient, to the bit, for 2 is a power of 2."""
    rows = examples(8)
    twice, seen = Twice(), []
    for callbacks in ([], [twice]):
        (step,) = run(training(perturbed("lora", tiny_model()), []), callbacks, [pack(rows, 60)])
        seen.append(step.grad_norm)
    assert twice.counts == [sum(float(row.weights[1:].sum()) for row in rows)]
    assert seen[1] == seen[0] / 2


class Sometimes(PerRow):
    """It leaves the pack to the backward pass."""

    def on_pack(self, training: TrainingState, pack: Pack, part: LossSum, log_probs: Tensor) -> bool:
        return False

    def divisor(self, training: TrainingState, count: float) -> float:
        return count


def test_a_callback_may_leave_a_pack_to_the_backward_pass() -> None:
    norms = [
        run(training(perturbed("lora", tiny_model()), []), callbacks, [pack(examples(4), 60)])[0].grad_norm
        for callbacks in ([], [Sometimes()])
    ]
    assert norms[0] == norms[1]


def test_one_callback_takes_the_place_of_the_backward_pass_and_none_beside_a_fused_optimizer() -> None:
    state = training(perturbed("lora", tiny_model()), [])
    with raises("training/conflicting-settings", match="per-row and callbacks: other both"):
        run(state, [PerRow(), PerRow("other")], [])
    row = OPTIMIZERS["lomo"]
    lomo = row.callback(row.config(name="lomo"))
    state = training(perturbed("full", tiny_model()), with_optimizer([lomo]))
    with raises("training/conflicting-settings", match="optimizer lomo leaves none"):
        run(state, [lomo, PerRow()], [])
