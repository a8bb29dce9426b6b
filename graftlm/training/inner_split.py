"""The inner validation split: rows that no step trains on, for callbacks that learn from them: those of
`data.inner_rows`, or a share of the training rows (`Callback.inner_share`)."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from graftlm.data.batches.pack import Example, Group
from graftlm.errors import TrainingError
from graftlm.kernels.backend import TORCH, Backend
from graftlm.losses import LOSSES, LossConfig
from graftlm.training.setup import Setup
from graftlm.training.state import TrainingState

R = TypeVar("R", Example, Group, Example | Group)


def inner_split(examples: Sequence[R], share: float, *, loss: LossConfig, seed: int) -> tuple[list[R], list[R]]:
    """(training rows, inner validation split). The split is a share of the rows, drawn by the seed."""
    if not share:
        return list(examples), []
    check_inner_loss(loss)
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise TrainingError(
            f"callbacks: one of them needs an inner validation split, and there are only {len(examples)} rows in all",
            code="too-few-rows",
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    inner_numbers = set(order[:count])
    training_rows = [example for number, example in enumerate(examples) if number not in inner_numbers]
    return training_rows, [examples[number] for number in sorted(inner_numbers)]


def check_inner_loss(loss: LossConfig) -> None:
    """Raise TrainingError for a loss that the rows of an inner validation split do not have by themselves."""
    if LOSSES[loss.name].statistic is not None:
        raise TrainingError(
            f"callbacks: loss {loss.name} needs a statistic of whole steps, which an inner validation split has not",
            code="conflicting-settings",
        )


def make_inner_loss(
    setup: Setup, training: TrainingState, rows: Sequence[Example | Group], backend: Backend = TORCH
) -> Callable[[bool], Tensor]:
    """What `TrainingState.inner_loss` is: the mean loss over as many rows as a step has, others after each step.

    Every rank computes all of it: the rows are few, and all ranks must come to the same numbers.
    """
    model, config, objective = training.model, setup.train, setup.objective()

    def loss(gradient: bool) -> Tensor:
        first, count = training.done * config.batch_rows, min(config.batch_rows, len(rows))
        some = [rows[(first + i) % len(rows)] for i in range(count)]
        packs = [pack.to(model.device) for pack in setup.make_packs(some)]  # type: ignore[arg-type]
        weight, total = sum(map(objective.count, packs)), 0.0
        torch.manual_seed(training.seed_for("aside"))  # for dropout, as in a step
        with (
            setup.passes(backend).through(model),
            torch.set_grad_enabled(gradient),
        ):
            for pack in packs:
                part = objective.part(model, pack)[0].sum / weight
                if gradient:
                    part.backward()
                total += float(part.detach())
        return torch.tensor(total)

    return loss
