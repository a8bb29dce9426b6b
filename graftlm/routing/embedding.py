"""A text as a vector, by the base itself: the mean of its last hidden states, of length 1."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftlm.generation.engine import model_lock
from graftlm.model.modes import by_row, deltas_still
from graftlm.model.routes import Row
from graftlm.passes.forward import require_decoder


@torch.no_grad()
def embedding(model: Any, ids: Sequence[int], row: Row) -> Tensor:
    """The mean over tokens of the states before the head [d], float32, divided by its Euclidean norm.

    `row` is the deltas that act; {} is the base. Raises TrainingError for a model that names no decoder.
    """
    with model_lock(model), deltas_still(model), by_row(model, [row]):
        decoder = require_decoder(model)
        given = torch.tensor([list(map(int, ids))], device=model.device)
        states = decoder(input_ids=given, use_cache=False).last_hidden_state
    mean = states[0].float().mean(0)
    found: Tensor = mean / mean.norm().clamp_min(1e-12)
    return found
