"""What computes the packs of a run: chosen once by the first rank, for all ranks and for every `--resume`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from graftlm import distributed
from graftlm.data.batches.pack import Example, Group, Pack
from graftlm.data.batches.prompts import PromptExample
from graftlm.errors import TrainingError
from graftlm.kernels.backend import TORCH, Backend
from graftlm.model.modes import deltas_off
from graftlm.passes.autotune import KernelChoice, choose
from graftlm.passes.packing_check import check_packing
from graftlm.training.setup import Answers, Setup

STEPS_SEEN = 16
"""The packs of so many steps, the largest among them, stand for those of the run."""


def choose_kernels(
    setup: Setup,
    model: Any,
    examples: Sequence[Example | Group],
    batches: Sequence[Sequence[int]],
    saved: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> tuple[KernelChoice, Backend]:
    """The choice for a run of `batches`, on a model that has its deltas and is not sharded yet, and its backend.

    `saved` is the choice of a checkpoint: it is used again where this machine can. The backend is proved on the model,
    as `check_packing` proves torch's operations.
    """
    console = console or Console(quiet=True)
    kernels = setup.train.kernels
    if not setup.packed:
        return KernelChoice(kernels, "the model's own code computes rows that are not packed"), TORCH
    if saved is not None and saved["kernels"] == kernels:
        choice = KernelChoice.from_json(saved)
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
        packs = packs_like(setup, examples, batches)
        each = len(packs) / min(len(batches), STEPS_SEEN)
        with console.status("timing kernels"):
            choice_here = choose(model, [p.to(model.device) for p in packs], kernels, passes=round(each * len(batches)))
        found = [choice_here.to_json()]
    (tree,) = distributed.gathered(found)
    choice = KernelChoice.from_json(tree)
    backend = choice.backend(model.device, model.dtype)
    if backend is not TORCH:
        with deltas_off(model):
            check_packing(model, examples, packed=True, sharing=setup.train.prefix_sharing, backend=backend)
    return choice, backend


def packs_like(setup: Setup, examples: Sequence[Example | Group], batches: Sequence[Sequence[int]]) -> list[Pack]:
    """The packs of the first steps, as one rank has them. Of prompts: with answers of the length that is allowed."""
    found = []
    for step in batches[:STEPS_SEEN]:
        rows = [examples[i] for i in step[:: distributed.count()]]
        if setup.answers is not None:
            rows = [with_answer(row, setup.answers) for row in rows for _ in range(setup.answers.samples)]
        found += setup.make_packs(rows)
    return found


def with_answer(prompt: Example | Group, answers: Answers) -> Example:
    """A prompt with an answer of the greatest length that is allowed."""
    assert isinstance(prompt, PromptExample)
    ids = np.resize(prompt.ids, len(prompt) + answers.max_tokens)
    return Example(ids, (np.arange(len(ids)) >= len(prompt)).astype(np.float32), prompt.where)
