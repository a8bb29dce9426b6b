"""Every callback with every kind of method trains, or says why not; and checkpoints hold all of its state."""

import json
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from graftlm.config.schema import build, to_tree
from graftlm.data.batches.pack import pack
from graftlm.model.registry import trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback, check_callbacks
from graftlm.training.snapshot import put_back, put_deltas_back, take
from graftlm.training.state import TrainingState
from tests.callbacks.tables import TABLE, make
from tests.callbacks.test_callbacks import run, training, walk
from tests.errors import raises
from tests.training.test_loop import examples

SMALL: dict[str, Any] = {"rank": 2, "every": 2, "layers": 1, "groups": 8}
"""Values for options of these names at which a callback acts on the tiny model within three steps."""

NO_LORA = ("mora", "vera", "full")

METHODS = ("lora", "dora", "mora", "vera", "full")

OF_ONE_METHOD = {
    "adalora": ("adalora", "bilora", "increlora"),
    "diff-pruning": ("diff-pruning",),
    "dylora": ("dylora",),
    "gated-lora": ("autolora", "diffora", "sora"),
    "lamda": ("lamda",),
    "spiel": ("spiel",),
}
"""Policies that act on what one method has: tests/callbacks/test_resume.py has them with that method."""

REFUSED = {
    **{(name, method): "factors A and B" for name in ("allora", "lora-fa", "riemannian") for method in NO_LORA},
    **{(name, "vera"): "both sides" for name in ("coap", "flora-compression", "galore")},
    ("lora-plus", "full"): "named B",
    ("lora-plus", "mora"): "named B",
    ("lora-plus", "vera"): "named B",
    **{
        (name, method): f"method: {wanted}"
        for wanted, names in OF_ONE_METHOD.items()
        for name in names
        for method in METHODS
    },
    **{("alora", method): "inner validation split" if method == "lora" else "method: lora" for method in METHODS},
    **{("i-lora", method): "inner validation split" for method in METHODS},
    **{("velora", method): f"of {method} not" for method in ("mora", "vera")},
    **{(n, m): "no product B A" for n in ("cola", "lte", "periodic-lora") for m in ("dora", "mora", "full")},
}
"""The pairs that have no meaning, and what the reason says."""


LIBRARIES = {"adamw-8bit": "bitsandbytes", "schedule-free": "schedulefree"}
"""What a callback needs that may not be here."""


def _lacks(name: str) -> bool:
    return name in LIBRARIES and find_spec(LIBRARIES[name]) is None


def small(name: str) -> Callback:
    config = TABLE[name].config
    options = {key: value for key, value in SMALL.items() if key in {f.name for f in fields(config)}}
    return make([build(config, {"name": name} | options, source="test")])[0]


def made(name: str, method: str) -> tuple[TrainingState, Callback]:
    model = perturbed(method, tiny_model(num_hidden_layers=4))
    for module in model.modules():
        if hasattr(module, "deltas"):
            module.deltas.train()
    callback = small(name)
    return training(model, [callback], total=6), callback


BATCHES = [pack(examples(seed=n), 60) for n in range(5)]


@pytest.mark.sampled
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TABLE)
def test_it_trains_or_says_why_not(name: str, method: str) -> None:
    if _lacks(name):
        with raises("training/missing-package", match="pip install"):
            made(name, method)
        return
    state, callback = made(name, method)
    if reason := REFUSED.get((name, method)):
        with raises("training/callback-unsupported", match=reason):
            check_callbacks([callback], state)
        return
    before = {key: p.detach().clone() for key, p in trainable(state.model).items()}
    done = run(state, [callback], BATCHES[:3])
    callback.on_end(state)
    assert len(done) == 3
    assert all(step.grad_norm > 0 for step in done)
    assert any(not torch.equal(p, before[key]) for key, p in state.parameters().items())
    assert all(p.grad is None for p in state.model.parameters())


@pytest.mark.sampled
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TABLE)
def test_what_a_checkpoint_keeps_is_all_that_a_callback_knows(name: str, method: str) -> None:
    if (name, method) in REFUSED or _lacks(name):
        return
    whole, callback = made(name, method)
    for step in walk(whole, [callback], BATCHES):
        if step.number == 3:
            snapshot = take(whole, [callback], ["default"])
    again, fresh = made(name, method)
    put_deltas_back(snapshot, again.model, ["default"])
    put_back(replace(snapshot, facts=json.loads(json.dumps(snapshot.facts))), again, [fresh])
    run(again, [fresh], BATCHES[3:])
    for state, acting in ((whole, callback), (again, fresh)):
        acting.on_end(state)
    for (key, p), q in zip(whole.parameters().items(), again.parameters().values(), strict=True):
        assert torch.equal(p, q), key
    assert callback.facts == fresh.facts


@pytest.mark.parametrize(("name", "module"), LIBRARIES.items())
def test_a_library_that_is_missing_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in [m for m in sys.modules if m.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, module, None)
    with raises("training/missing-package", match="pip install"):
        made(name, "lora")


@pytest.mark.parametrize("name", TABLE)
def test_its_config_is_written_and_read_back(name: str) -> None:
    config = small(name).config
    assert build(type(config), to_tree(config), source="test") == config
