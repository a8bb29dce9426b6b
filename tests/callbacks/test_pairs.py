"""What may stand beside each other in a run is what it was when one recipe key, `policies`, named all of it.

Commit 27ef45a wrote `tests/golden/before_house/pairs.json`: for every policy of then and for every ordered pair of
them, the methods that they were allowed with, on the tiny model and with the options of `small`.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.callbacks import CALLBACKS
from graftlm.config.schema import build
from graftlm.errors import TrainingError
from graftlm.model.registry import attachment
from graftlm.optim import OPTIMIZERS
from graftlm.recipe import Recipe
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback, check_callbacks
from graftlm.training.state import TrainingState
from tests.callbacks.test_every_callback import small
from tests.errors import raises

BEFORE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden/before_house/pairs.json").read_text())
METHODS = ("lora", "full", "adalora", "diff-pruning", "dylora", "gated-lora", "lamda", "spiel")


@cache
def state(method: str) -> TrainingState:
    model = perturbed(method, tiny_model(num_hidden_layers=4))
    adamw = torch.optim.AdamW([torch.zeros(1)])  # in every pair, as then: a run makes its own
    found = TrainingState(model, attachment(model).configs, adamw, total=6, seed=0)
    found.inner_loss = lambda gradient: torch.tensor(0.0)
    return found


def allowed(*names: str) -> list[str]:
    """The methods with which a run may have these."""
    optimizers = [name for name in names if name in OPTIMIZERS]
    callbacks = [name for name in names if name in CALLBACKS]
    tree = {"data": {"train": "x"}, "callbacks": callbacks, "optimizer": optimizers[0] if optimizers else "adamw"}
    if len(optimizers) > 1:
        with raises("recipe/invalid-value", match=f"write `optimizer: {optimizers[1]}`"):
            build(Recipe, tree | {"callbacks": optimizers[1:]}, source="test")
        return []
    build(Recipe, tree, source="test")
    return [method for method in METHODS if _passes([small(name) for name in (*optimizers, *callbacks)], method)]


def _passes(chosen: Sequence[Callback], method: str) -> bool:
    try:
        check_callbacks(chosen, state(method))
    except TrainingError:
        return False
    return True


def test_every_policy_of_before_is_an_optimizer_or_a_callback() -> None:
    assert sorted(BEFORE["alone"]) == sorted([*OPTIMIZERS.keys() - {"adamw"}, *CALLBACKS])
    assert sorted(BEFORE["optimizers"]) == sorted(OPTIMIZERS.keys() - {"adamw"})


@pytest.mark.parametrize("name", BEFORE["alone"])
def test_what_was_allowed_is_allowed_and_nothing_else(name: str) -> None:
    assert allowed(name) == BEFORE["alone"][name]
    for other in BEFORE["alone"]:
        if other != name:
            assert allowed(name, other) == BEFORE["pairs"][f"{name} {other}"], other
