"""What a callback makes of the method's rate, where the recipe gives none, is a rate at which something is learnt."""

from typing import Any

import pytest
import torch

from graftlm.config.schema import build
from graftlm.kernels.backend import TORCH
from graftlm.model.attach import attach
from graftlm.optim import OPTIMIZERS
from graftlm.recipe import Recipe
from graftlm.testing import tiny_model
from graftlm.training.trainer import Trainer
from tests.training.test_loop import examples

OTHERS = {
    "full": [{"name": "lomo"}, {"name": "sm3"}, {"name": "galore", "rank": 16}, {"name": "coap", "rank": 16}],
    "lora": [{"name": "lora-plus"}, {"name": "sm3"}],
}


def fall(method: str, parts: dict[str, Any]) -> float:
    """How far 12 steps at default rates bring down the loss of the rows that they are taken on."""
    sections = {"data": {"train": "rows.jsonl"}, "delta": {"method": method}} | parts
    recipe = build(Recipe, sections, source="test")
    model = attach(tiny_model(), recipe.all_deltas()["default"])
    rows = examples()
    done = list(Trainer(recipe.setup(), model, rows, [list(range(len(rows)))] * 12, backend=TORCH).steps())
    return done[0].loss - done[-1].loss


@pytest.mark.parametrize(
    ("method", "callback"), [(method, callback) for method, callbacks in OTHERS.items() for callback in callbacks],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)  # fmt: skip
def test_it_learns_at_least_half_of_what_adamw_does(method: str, callback: dict[str, Any]) -> None:
    torch.manual_seed(0)
    wanted = fall(method, {})
    assert wanted > 0
    assert fall(method, {"optimizer" if callback["name"] in OPTIMIZERS else "callbacks": callback}) > wanted / 2
