"""What a policy says that its optimiser keeps is what it keeps; `graft estimate` counts by it."""

from typing import Any

import pytest
import torch

from graftlm.callbacks import POLICIES
from graftlm.data.batches.pack import pack
from graftlm.model.layers.registry import attachment
from graftlm.planning.memory import update_bytes
from graftlm.recipe import Recipe
from graftlm.training.callback import Policy
from tests.callbacks.test_callbacks import run
from tests.callbacks.test_every_callback import REFUSED, _lacks, made
from tests.training.test_loop import examples


class Gradients(Policy):
    """Bytes of the gradients that a step leaves."""

    bytes = 0

    def on_grads(self, training: Any) -> None:
        here = sum(4 * p.grad.numel() for p in training.parameters().values() if p.grad is not None)
        self.bytes = max(self.bytes, here)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_plan_counts_what_there_is(name: str, method: str) -> None:
    if (name, method) in REFUSED or _lacks(name):
        return
    state, policy = made(name, method)
    watching = Gradients(None)
    watched = [] if policy.fused else [watching]
    run(state, [policy, *watched], [pack(examples(seed=n), 10_000) for n in range(3)])
    shared: dict[int, torch.Tensor] = {}  # tables of codes are one for all
    kept = 0
    for values in state.optimiser.state.values():
        for key, t in values.items():
            if isinstance(t, torch.Tensor) and t.dim():
                if "qmap" in str(key):
                    shared[t.data_ptr()] = t
                else:
                    kept += t.numel() * t.element_size()
    recipe = Recipe(
        data={"train": "x"},  # type: ignore[arg-type]
        delta=attachment(state.model).configs["default"],  # type: ignore[arg-type]
        policies=(policy.config,),
    )
    gradients, said = update_bytes(recipe, state.model, several_packs=False)
    assert said == kept
    if watched:
        assert gradients == watching.bytes
