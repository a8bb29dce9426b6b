"""Rows that are kept out of training for policies that learn from them (`Policy.wants_aside`)."""

from collections.abc import Callable, Sequence
from zlib import crc32

import torch
from torch import Tensor

from graftlm.data.pack import Example, Pack
from graftlm.errors import TrainingError
from graftlm.losses import LOSSES
from graftlm.model.forward import log_probs
from graftlm.training.loop import training_pass
from graftlm.training.policies import POLICIES
from graftlm.training.policies.base import Training
from graftlm.training.recipe import Recipe


def put_aside(recipe: Recipe, examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(what is trained on, what is put aside): as large a share as a policy of the recipe wants, drawn by the seed."""
    share = max((POLICIES[policy.name].policy.wants_aside for policy in recipe.policies), default=0.0)
    if not share:
        return list(examples), []
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise TrainingError(f"policies: rows are to be put aside, and there are only {len(examples)} in all")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(recipe.train.seed)).tolist()
    chosen = set(order[:count])
    learnt = [example for number, example in enumerate(examples) if number not in chosen]
    return learnt, [examples[number] for number in sorted(chosen)]


def loss_aside(
    recipe: Recipe, training: Training, rows: Sequence[Example], make: Callable[[Sequence[Example]], list[Pack]]
) -> Callable[[bool], Tensor]:
    """What `Training.aside` is: the mean loss over as many rows as a step has, others after each step, in turn.

    Every rank computes all of it: the rows are few, and all ranks must come to the same numbers.
    """
    model, config = training.model, recipe.train

    def loss(gradient: bool) -> Tensor:
        first, count = training.done * config.batch_rows, min(config.batch_rows, len(rows))
        packs = [p.to(model.device) for p in make([rows[(first + i) % len(rows)] for i in range(count)])]  # type: ignore[arg-type]
        weight, total = sum(float(p.weights.sum()) for p in packs), 0.0
        torch.manual_seed(crc32(f"{training.seed}/{training.done}/aside".encode()))  # for dropout, as in a step
        with (
            training_pass(
                model,
                packed=recipe.data.pack,
                checkpointing=config.checkpointing,
                offload=config.offload,
                compiled=config.compile,
            ),
            torch.set_grad_enabled(gradient),
        ):
            for pack in packs:
                part = LOSSES[recipe.loss](log_probs(model, pack), None, pack.weights).sum / weight
                if gradient:
                    part.backward()
                total += float(part.detach())
        return torch.tensor(total)

    return loss
