"""The proof, on the model at hand, that it computes what training assumes: before anything is trained."""

from collections.abc import Sequence
from typing import Any

import torch

from graftlm.data.batches.pack import Example, Group
from graftlm.kernels.backend import TORCH, Backend
from graftlm.model.passes.forward import PROBE_TOKENS, check_forward, check_packing


def prove(
    model: Any, items: Sequence[Example | Group], *, packed: bool, sharing: bool, backend: Backend = TORCH
) -> None:
    """TrainingError where the head, packed attention or shared beginnings give other numbers than the model's own.

    The rows are the shortest and the longest of the run: what changes with a row's length shows between these. Another
    backend is proved after TORCH was: by the whole model in packs, as the rest does not go through it.
    """
    examples = [answer for item in items for answer in item.answers]
    short, long = (
        torch.from_numpy(example.ids.astype("int64")).to(model.device)
        for example in (min(examples, key=len), max(examples, key=len))
    )
    if backend is TORCH:
        check_forward(model, long[-PROBE_TOKENS:])
    if packed:
        check_packing(model, short, long, sharing=sharing, longest=len(long), backend=backend)
