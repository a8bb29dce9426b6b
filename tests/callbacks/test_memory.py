"""What a callback says that its optimizer keeps is what it keeps; `graft estimate` counts by it."""

from typing import Any

import pytest
import torch

from graftlm.data.batches.pack import pack
from graftlm.model.registry import attachment
from graftlm.planning.memory import update_bytes
from graftlm.recipe import Recipe
from graftlm.training.callback import Callback
from tests.callbacks.tables import TABLE, is_fused, section
from tests.callbacks.test_callbacks import run
from tests.callbacks.test_every_callback import REFUSED, _lacks, made
from tests.training.test_loop import examples


class Gradients(Callback):
    """Bytes of the gradients that a step leaves."""

    bytes = 0

    def on_grads(self, training: Any) -> None:
        here = sum(4 * p.grad.numel() for p in training.parameters().values() if p.grad is not None)
        self.bytes = max(self.bytes, here)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", TABLE)
def test_a_plan_counts_what_there_is(name: str, method: str) -> None:
    if (name, method) in REFUSED or _lacks(name):
        return
    state, callback = made(name, method)
    watching = Gradients(None)
    watched = [] if is_fused(callback) else [watching]
    run(state, [callback, *watched], [pack(examples(seed=n), 10_000) for n in range(3)])
    shared: dict[int, torch.Tensor] = {}  # tables of codes are one for all
    state_bytes = 0
    for values in state.optimizer.state.values():
        for key, t in values.items():
            if isinstance(t, torch.Tensor) and t.dim():
                if "qmap" in str(key):
                    shared[t.data_ptr()] = t
                else:
                    state_bytes += t.numel() * t.element_size()
    recipe = Recipe(
        data={"train": "x"},  # type: ignore[arg-type]
        delta=attachment(state.model).configs["default"],  # type: ignore[arg-type]
        **section(callback.config),
    )
    gradients, planned_bytes = update_bytes(recipe, state.model, several_packs=False)
    assert planned_bytes == state_bytes
    if watched:
        assert gradients == watching.bytes
