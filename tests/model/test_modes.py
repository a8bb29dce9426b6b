"""Deltas that are on and off, and each in its mode again."""

from typing import Any

import pytest
import torch

from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach, detach
from graftlm.model.modes import activate, deltas_off, deltas_still
from graftlm.model.registry import hosts
from graftlm.testing.deltas import logits, move, perturbed
from tests.errors import raises
from tests.peers import relative_error

pytestmark = pytest.mark.versions

SMALL = LoraConfig(r=2, alpha=4)


def test_two_deltas_add_and_each_can_be_on_alone(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    base = layer(x)
    attach(model, SMALL, name="one", seed=1)
    attach(model, LoraConfig(r=3, alpha=5), name="two", targets=("up_proj",), seed=2)
    move(model)
    host = hosts(model)["model.layers.0.mlp.up_proj"]

    def shift(*names: str) -> torch.Tensor:
        activate(model, *names)
        return host(x) - base

    both, first, second = shift("one", "two"), shift("one"), shift("two")
    assert relative_error(both, first + second) <= 1e-5
    assert not torch.equal(first, second)
    assert hosts(model)["model.layers.0.mlp.down_proj"].active == ()
    assert not shift().any(), "with no name, the bare base"


def test_activating_an_unknown_delta_names_the_nearest(model: Any) -> None:
    attach(model, SMALL, name="poet")
    with raises("target/no-such-delta", match="'poets'.*'poet'"):
        activate(model, "poets")
    with raises("target/no-such-delta", match="'poets'.*'poet'"):
        detach(model, "poets")


def test_deltas_off_nests_and_restores_what_was_active(model: Any) -> None:
    base = logits(model)
    attach(model, SMALL, name="one", seed=1)
    attach(model, SMALL, name="two", seed=2)
    move(model)
    activate(model, "two")
    on = logits(model)
    with deltas_off(model) as same:
        assert same is model
        with deltas_off(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base), "the inner block must not switch on what the outer switched off"
    assert torch.equal(logits(model), on)
    assert all(host.active == ("two",) for host in hosts(model).values())


def test_deltas_off_restores_after_an_exception(model: Any) -> None:
    perturbed("lora", model)
    on = logits(model)
    with pytest.raises(KeyError), deltas_off(model):
        raise KeyError
    assert torch.equal(logits(model), on)


def test_deltas_are_still_inside_and_each_is_in_its_own_mode_again_afterwards(model: Any) -> None:
    attach(model, LoraConfig(r=2, dropout=0.5))
    attach(model, LoraConfig(r=2, dropout=0.5), name="asleep")
    for host in hosts(model).values():
        host.deltas["default"].train()
    modes = {name: module.training for name, module in model.named_modules()}
    assert len({*modes.values()}) == 2
    with deltas_still(model):
        assert not any(delta.training for host in hosts(model).values() for delta in host.deltas.values())
    assert {name: module.training for name, module in model.named_modules()} == modes
