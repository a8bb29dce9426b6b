"""The proof, on the model at hand, that it computes what training assumes: before anything is trained."""

from collections.abc import Sequence
from typing import Any

import torch

from graftlm.data.pack import Example, Group
from graftlm.model.backend import TORCH, Backend
from graftlm.model.forward import check_forward, check_packing

PROBE_TOKENS = 32
"""The proof is on the last so many tokens of two rows (the first ones may be a system prompt that all rows have). A
head or a layer that does something of its own does it to every token, and rounding does not grow with fewer: 0.06 nats
a token in bf16 for 16 tokens as for 128. Where attention goes by tiles and windows is a matter of our own code, which
is the same for every model: tests see to that."""


def prove(
    model: Any, items: Sequence[Example | Group], *, packed: bool, sharing: bool, backend: Backend = TORCH
) -> None:
    """TrainingError where the head, packed attention or shared beginnings give other numbers than the model's own."""
    examples = [answer for item in items for answer in item.answers]
    probes = (min(examples, key=len), max(examples, key=len))
    short, long = (torch.from_numpy(example.ids[-PROBE_TOKENS:].astype("int64")).to(model.device) for example in probes)
    check_forward(model, long)
    if packed:
        check_packing(model, short, long, sharing=sharing, backend=backend)
