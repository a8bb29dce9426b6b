"""A run that goes on in another process is the unbroken one, bit for bit: tensors, facts and optimizer suffice."""

import json
from copy import deepcopy
from typing import Any

import pytest
import torch

from graftlm.config.schema import build
from graftlm.data.batches.pack import collate
from graftlm.model.registry import trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny
from graftlm.training.callback import Callback
from graftlm.training.state import TrainingState
from tests.callbacks.tables import TABLE
from tests.callbacks.test_callbacks import run, training
from tests.callbacks.test_inner_split import with_inner_loss
from tests.training.test_loop import examples

TOTAL = 10
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("adalora", {"target_r": 2, "every": 3}),
    "alora": ("lora", {"first": 2, "moves": 2, "every": 3}),
    "autolora": ("gated-lora", {"search": 0.5}),
    "bilora": ("adalora", {}),
    "cola": ("lora", {"every": 3}),
    "diff-pruning": ("diff-pruning", {"density": 0.05}),
    "diffora": ("gated-lora", {"search": 0.5}),
    "dylora": ("dylora", {"frozen": True}),
    "i-lora": ("lora", {"decay": 0.6}),
    "increlora": ("adalora", {"target_r": 3, "every": 2}),
    "lamda": ("lamda", {"until": 0.6}),
    "lte": ("lora", {"heads": 2, "every": 2}),
    "periodic-lora": ("lora", {"every": 3}),
    "sora": ("gated-lora", {"sparsity": 3.0, "sparsity_last": 9.0}),
    "spiel": ("spiel", {"every": 3}),
    "velora": ("lora", {"groups": 8}),
}


def begun(name: str) -> tuple[TrainingState, Callback]:
    method, options = CASES[name]
    state = with_inner_loss(training(attach_tiny(method, tiny_model()), [], total=TOTAL))
    config = build(TABLE[name].config, {"name": name, **options}, source="test")
    return state, TABLE[name].callback(config)


def end(name: str, stop: int | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    state, callback = begun(name)
    batches = [[collate(examples(seed=number))] for number in range(TOTAL)]
    losses = [step.loss for step in run(state, [callback], batches[:stop])]
    if stop is not None:
        old, saved_state = state, (state.optimizer.state_dict(), callback.tensors, json.dumps(callback.facts))
        state, callback = begun(name)
        for (_, _, here), (_, _, there) in zip(state.sites(), old.sites(), strict=True):
            for key, buffer in there.named_buffers():
                setattr(here, key, buffer.clone())
            here.load_state_dict(there.state_dict())
        state.optimizer.load_state_dict(deepcopy(saved_state[0]))
        callback.tensors, callback.facts = (
            {key: t.clone() for key, t in saved_state[1].items()},
            json.loads(saved_state[2]),
        )
        state.done = stop
        losses += [step.loss for step in run(state, [callback], batches[stop:])]
    callback.on_end(state)
    found = {f"{site}.{key}": t for _, site, delta in state.sites() for key, t in delta.state_dict().items()}
    return losses, found | {f"learns {name}": p for name, p in trainable(state.model).items()}


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_goes_on_is_the_unbroken_one(name: str) -> None:
    losses, wanted = end(name, None)
    for stop in (1, 5, 7):
        again, found = end(name, stop)
        assert again == losses
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], t) for key, t in wanted.items())
