"""What computes the packs of a run: chosen once by the first rank, for all ranks and for every `--resume`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from graftlm import distributed
from graftlm.data.batches.pack import Example, Group, Pack, lay_out
from graftlm.data.batches.prompts import Prompt
from graftlm.errors import TrainingError
from graftlm.kernels.backend import TORCH, Backend
from graftlm.model.layers.attach import deltas_off
from graftlm.model.passes.autotune import Choice, choose
from graftlm.model.passes.packing_check import check_packing
from graftlm.recipe import Recipe

STEPS_SEEN = 16
"""The packs of so many steps, the largest among them, stand for those of the run."""


def choose_kernels(
    recipe: Recipe,
    model: Any,
    examples: Sequence[Example | Group],
    plan: Sequence[Sequence[int]],
    saved: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> tuple[Choice, Backend]:
    """The choice for a run of `plan`, on a model that has its deltas and is not sharded yet, and its backend.

    `saved` is the choice of a checkpoint: it is used again where this machine can. The backend is proved on the model,
    as `check_packing` proves torch's operations.
    """
    console = console or Console(quiet=True)
    wanted = recipe.train.kernels
    if not recipe.data.pack:
        return Choice(wanted, "the model's own code computes rows that are not packed"), TORCH
    if saved is not None and saved["kernels"] == wanted:
        choice = Choice.from_json(saved)
        try:
            return choice, choice.backend(model.device, model.dtype)
        except TrainingError as error:
            console.print(
                f"{error}\nThe run began with these kernels. They are chosen anew, so its last bits will differ from "
                "those of a run that was not interrupted",
                highlight=False,
                markup=False,
            )
    found = []
    if distributed.first():  # the others wait: timing wants a machine for itself
        packs = packs_like(recipe, examples, plan)
        each = len(packs) / min(len(plan), STEPS_SEEN)
        with console.status("timing kernels"):
            chosen = choose(model, [p.to(model.device) for p in packs], wanted, passes=round(each * len(plan)))
        found = [chosen.to_json()]
    (tree,) = distributed.gathered(found)
    choice = Choice.from_json(tree)
    backend = choice.backend(model.device, model.dtype)
    if backend is not TORCH:
        with deltas_off(model):
            check_packing(model, examples, packed=True, sharing=recipe.train.prefix_sharing, backend=backend)
    return choice, backend


def packs_like(recipe: Recipe, examples: Sequence[Example | Group], plan: Sequence[Sequence[int]]) -> list[Pack]:
    """The packs of the first steps, as one rank has them. Of prompts: with answers of the length that is allowed."""
    found = []
    for step in plan[:STEPS_SEEN]:
        rows = [examples[i] for i in step[:: distributed.count()]]
        if recipe.online:
            rows = [_answered(row, recipe.online.max_new_tokens) for row in rows for _ in range(recipe.online.samples)]
        found += lay_out(rows, recipe.train.pack_tokens, packed=True, share=recipe.train.prefix_sharing)
    return found


def _answered(prompt: Example | Group, tokens: int) -> Example:
    assert isinstance(prompt, Prompt)
    ids = np.resize(prompt.ids, len(prompt) + tokens)
    return Example(ids, (np.arange(len(ids)) >= len(prompt)).astype(np.float32), prompt.where)
