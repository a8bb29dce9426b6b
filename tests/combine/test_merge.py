"""A composition of one adapter with weight 1 is that adapter, for every mergeable method."""

import pytest
import torch

from graftlm.combine.merge import merge
from graftlm.deltas import METHODS
from graftlm.deltas.lora import LoraConfig
from graftlm.model.layers.attach import attach
from graftlm.model.layers.modes import deltas_off
from graftlm.model.layers.registry import attachment, hosts
from graftlm.model.layers.state_dict import merged_state
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny, close, logits, move, perturbed, plain_with
from tests.errors import raises

MERGEABLE = [name for name, method in METHODS.items() if method.mergeable]


@pytest.mark.parametrize("name", MERGEABLE)
def test_one_adapter_with_weight_1_is_that_adapter_and_with_weight_0_the_base(name: str) -> None:
    model = perturbed(name, tiny_model())
    with deltas_off(model):
        base = logits(model)
    on = logits(model)
    active = {site: host.active for site, host in hosts(model).items()}
    close(logits(plain_with(merge(model, {"default": 1.0}))), on, f"{name} with weight 1")
    close(logits(plain_with(merge(model, {"default": 0.0}))), base, f"{name} with weight 0")
    assert {site: host.active for site, host in hosts(model).items()} == active
    assert torch.equal(logits(model), on), "the model is as it was"


@pytest.mark.parametrize("rslora", [False, True])
def test_additive_adapters_add_by_their_weights(rslora: bool) -> None:
    model = attach_tiny("lora", tiny_model())
    attach(model, LoraConfig(r=2, alpha=8, rslora=rslora), name="second")
    move(model)
    state = merge(model, {"default": 0.25, "second": -2.0})
    for site, host in hosts(model).items():
        first, second = host.on()
        wanted = host.base.weight + 0.25 * first.matrix() - 2 * second.matrix()
        close(state[f"{site}.weight"], wanted, site)


def test_the_mean_of_two_doras_is_the_mean_of_their_weights() -> None:
    model = attach_tiny("dora", tiny_model())
    attach_tiny("dora", model, delta="second", seed=4)
    move(model, scale=0.3)
    state = merge(model, {"default": 0.5, "second": 0.5})
    for site, host in hosts(model).items():
        W = host.view.weight
        made = [delta.effective(W, None)[0] for delta in host.on()]
        close(state[f"{site}.weight"], (made[0] + made[1]) / 2, site)


def test_a_new_bias_is_weighed_too() -> None:
    model = perturbed("bitfit", tiny_model(), targets=("q_proj",))
    whole, half = merged_state(model), merge(model, {"default": 0.5})
    key = "model.layers.0.self_attn.q_proj.bias"
    close(half[key], whole[key] / 2, key)


def test_what_cannot_be_merged_is_refused_and_the_model_left_as_it_was() -> None:
    model = perturbed("houlsby", tiny_model())
    before = logits(model)
    with raises("target/not-mergeable", match="non-linear"):
        merge(model, {"default": 1.0})
    with raises("target/no-such-delta", match="'defualt'"):
        merge(model, {"defualt": 1.0})
    assert torch.equal(logits(model), before)
    assert list(attachment(model).configs) == ["default"]
