"""The proof, on the model at hand, that it computes what training assumes: before anything is trained."""

from collections.abc import Sequence
from typing import Any

import torch

from graftlm.data.pack import Example, Group
from graftlm.model.forward import check_forward, check_packing

PROBE_TOKENS = 256
"""Packing is proved on a row of this length, if there is one: long enough to matter, a second's work."""


def prove(model: Any, items: Sequence[Example | Group], *, packed: bool, sharing: bool) -> None:
    """TrainingError where the head, packed attention or shared beginnings give other numbers than the model's own."""
    examples = [answer for item in items for answer in item.answers]
    probes = (min(examples, key=len), max(examples, key=len))
    short, long = (torch.from_numpy(example.ids.astype("int64")).to(model.device) for example in probes)
    check_forward(model, long[:PROBE_TOKENS])
    if packed:
        check_packing(model, short, long[:PROBE_TOKENS], sharing=sharing)
