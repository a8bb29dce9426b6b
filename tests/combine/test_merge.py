"""A composition of one adapter with weight 1 is that adapter, for every mergeable method."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from graftlm.adapters.export.merged import merge_into
from graftlm.combine.merge import merge
from graftlm.deltas import METHODS
from graftlm.deltas.lora import LoraConfig
from graftlm.hub.quantize_base import quantize
from graftlm.model.attach import attach
from graftlm.model.modes import activate, deltas_off
from graftlm.model.registry import attachment, hosts
from graftlm.model.state_dict import merged_state
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
    close(logits(plain_with(dict(merge(model, {"default": 1.0})))), on, f"{name} with weight 1")
    close(logits(plain_with(dict(merge(model, {"default": 0.0})))), base, f"{name} with weight 0")
    assert {site: host.active for site, host in hosts(model).items()} == active
    assert torch.equal(logits(model), on), "the model is as it was"


@pytest.mark.parametrize("rslora", [False, True])
def test_additive_adapters_add_by_their_weights(rslora: bool) -> None:
    model = attach_tiny("lora", tiny_model())
    attach(model, LoraConfig(r=2, alpha=8, rslora=rslora), name="second")
    move(model)
    state = dict(merge(model, {"default": 0.25, "second": -2.0}))
    for site, host in hosts(model).items():
        first, second = host.on()
        wanted = host.base.weight + 0.25 * first.matrix() - 2 * second.matrix()
        close(state[f"{site}.weight"], wanted, site)


def test_the_mean_of_two_doras_is_the_mean_of_their_weights() -> None:
    model = attach_tiny("dora", tiny_model())
    attach_tiny("dora", model, delta="second", seed=4)
    move(model, scale=0.3)
    state = dict(merge(model, {"default": 0.5, "second": 0.5}))
    for site, host in hosts(model).items():
        W = host.view.weight
        made = [delta.effective(W, None)[0] for delta in host.on()]
        close(state[f"{site}.weight"], (made[0] + made[1]) / 2, site)


def test_a_new_bias_is_weighed_too() -> None:
    model = perturbed("bitfit", tiny_model(), targets=("q_proj",))
    whole, half = merged_state(model), dict(merge(model, {"default": 0.5}))
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


def three_loras() -> Any:
    model = attach_tiny("lora", tiny_model())
    attach(model, LoraConfig(r=2, targets=("q_proj", "down_proj")), name="second")
    attach_tiny("dora", model, delta="third")
    return move(model, scale=0.2)


def test_three_deltas_are_the_base_and_the_sum_of_their_weighted_changes() -> None:
    model, weights = three_loras(), {"default": 0.5, "second": 0.3, "third": -0.7}
    base = {key: t.double() for key, t in tiny_model().state_dict().items()}
    wanted = dict(base)
    for name, weight in weights.items():
        activate(model, name)
        for key, tensor in merged_state(model).items():
            wanted[key] = wanted[key] + weight * (tensor.double() - base[key])
    found = dict(merge(model, weights))
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert tensor.dtype == torch.float32
        close(tensor.double(), wanted[key], key, 1e-6)


def test_one_tensor_is_made_at_a_time() -> None:
    model = three_loras()
    made: list[weakref.ref[torch.Tensor]] = []
    for _, tensor in merge(model, {"default": 1.0, "third": 0.5}):
        alive = {id(other()) for other in made if other() is not None}
        assert alive <= {id(tensor)}, "an earlier tensor is still held"
        made.append(weakref.ref(tensor))


def test_a_merge_that_is_left_early_leaves_the_model_as_it_was() -> None:
    model = three_loras()
    activate(model, "third", "default")
    before, on = logits(model), {site: host.active for site, host in hosts(model).items()}
    stream = merge(model, {"second": 1.0})
    next(stream)
    assert torch.equal(logits(model), before), "while the merge goes on"
    stream.close()
    assert {site: host.active for site, host in hosts(model).items()} == on
    assert torch.equal(logits(model), before)


def test_tied_names_come_in_a_row_with_one_tensor_unless_a_delta_parts_them() -> None:
    names = [name for name, _ in merge(three_loras(), {"default": 1.0})]
    assert names[:2] == ["model.embed_tokens.weight", "lm_head.weight"]
    found = dict(merge(three_loras(), {"default": 1.0}))
    assert found["model.embed_tokens.weight"] is found["lm_head.weight"]
    model = attach_tiny("lora", tiny_model(), targets=("embed_tokens",))
    parted = dict(merge(move(model, scale=0.3), {"default": 0.5}))
    assert torch.equal(parted["lm_head.weight"], tiny_model().lm_head.weight)
    assert not torch.allclose(parted["model.embed_tokens.weight"], parted["lm_head.weight"])


@pytest.mark.parametrize("targets", [("q_proj", "up_proj"), ("embed_tokens", "q_proj"), ("lm_head",)])
def test_a_weighted_merge_is_written_as_a_model_of_transformers(targets: tuple[str, ...], tmp_path: Path) -> None:
    model = attach_tiny("lora", tiny_model(), targets=targets)
    attach(model, LoraConfig(r=2, targets=targets), name="second")
    move(model, scale=0.3)
    weights = {"default": 0.5, "second": 2.0}
    merge_into(model, tmp_path / "out", tensors=merge(model, weights))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    close(logits(again), logits(plain_with(dict(merge(model, weights)))), "written and in memory")
    assert again.config.tie_word_embeddings == (targets == ("q_proj", "up_proj"))


def test_the_parts_of_an_adapter_that_is_several_deltas_have_its_weight() -> None:
    model = three_loras()
    attachment(model).members["both"] = ("second", "third")
    attachment(model).configs["both"] = attachment(model).configs["second"]
    activate(model, "second", "third")
    wanted = merged_state(model)
    for key, tensor in dict(merge(model, {"both": 1.0})).items():
        close(tensor, wanted[key], key)


def test_a_quantized_base_is_merged_from_its_own_weights() -> None:
    model = perturbed("lora", quantize(tiny_model(), "int8"))
    with deltas_off(model):
        base = merged_state(model)
    whole = merged_state(model)
    for key, tensor in dict(merge(model, {"default": 0.5})).items():
        close(tensor, (base[key] + whole[key]) / 2, key)
