"""Rows that are kept out of training for policies that learn from them (`Policy.wants_aside`)."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from graftlm.callbacks import POLICIES
from graftlm.data.batches.pack import Example, Group, Pack
from graftlm.errors import TrainingError
from graftlm.kernels.backend import TORCH, Backend
from graftlm.recipe import Recipe
from graftlm.training.callback import Training
from graftlm.training.loop import training_pass
from graftlm.training.objective import Objective

Rows = Sequence[Example | Group]
R = TypeVar("R", Example, Group, Example | Group)


def put_aside(recipe: Recipe, examples: Sequence[R]) -> tuple[list[R], list[R]]:
    """(what is trained on, what is put aside): as large a share as a policy of the recipe wants, drawn by the seed."""
    share = max((POLICIES[policy.name].policy.wants_aside for policy in recipe.policies), default=0.0)
    if not share:
        return list(examples), []
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise TrainingError(f"policies: rows are to be put aside, and there are only {len(examples)} in all")
    objective = Objective(recipe.loss)
    if objective.loss.statistic is not None:
        raise TrainingError(f"policies: {objective.config.name} looks at whole steps, which rows put aside are not")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(recipe.train.seed)).tolist()
    chosen = set(order[:count])
    learnt = [example for number, example in enumerate(examples) if number not in chosen]
    return learnt, [examples[number] for number in sorted(chosen)]


def loss_aside(
    recipe: Recipe, training: Training, rows: Rows, make: Callable[[Rows], list[Pack]], backend: Backend = TORCH
) -> Callable[[bool], Tensor]:
    """What `Training.aside` is: the mean loss over as many rows as a step has, others after each step, in turn.

    Every rank computes all of it: the rows are few, and all ranks must come to the same numbers.
    """
    model, config, objective = training.model, recipe.train, Objective(recipe.loss)

    def loss(gradient: bool) -> Tensor:
        first, count = training.done * config.batch_rows, min(config.batch_rows, len(rows))
        packs = [p.to(model.device) for p in make([rows[(first + i) % len(rows)] for i in range(count)])]  # type: ignore[arg-type]
        weight, total = sum(map(objective.count, packs)), 0.0
        torch.manual_seed(training.seed_for("aside"))  # for dropout, as in a step
        with (
            training_pass(model, **recipe.passes(), backend=backend),
            torch.set_grad_enabled(gradient),
        ):
            for pack in packs:
                part = objective.part(model, pack)[0].sum / weight
                if gradient:
                    part.backward()
                total += float(part.detach())
        return torch.tensor(total)

    return loss
