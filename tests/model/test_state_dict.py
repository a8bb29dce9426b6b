"""Weights under the base's names: merged, and the base's own."""

from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach, detach
from graftlm.model.modes import deltas_off
from graftlm.model.registry import hosts
from graftlm.model.sites import find_sites
from graftlm.model.state_dict import base_parameters, merged_state
from graftlm.testing import tiny_model
from graftlm.testing.deltas import logits, move, perturbed
from tests.peers import relative_error

pytestmark = pytest.mark.versions

SMALL = LoraConfig(r=2, alpha=4)


def test_base_parameters_have_their_own_names_with_deltas_on(model: Any) -> None:
    wanted = {name: id(p) for name, p in model.named_parameters()}
    attach(model, SMALL)
    attach(model, SMALL, name="head", targets=("lm_head",))
    assert {name: id(p) for name, p in base_parameters(model).items()} == wanted


@pytest.mark.parametrize(
    ("kind", "targets", "changes"),
    [
        ("llama", "all-linear", {"attention_bias": True, "mlp_bias": True}),
        ("llama", ("q_proj", "lm_head"), {"tie_word_embeddings": False}),
        ("gpt2", "all-linear", {}),
        ("gpt_neox", "all-linear", {"attention_bias": True}),
    ],
)
def test_the_merged_state_in_a_plain_model_computes_the_same(kind: str, targets: Any, changes: dict[str, Any]) -> None:
    model = tiny_model(kind, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attach(model, SMALL, targets=targets)
    move(model)
    attached = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = merged_state(model)
    assert all(torch.equal(t, attached[k]) for k, t in model.state_dict().items()), "merging must change nothing"
    assert list(hosts(model)) == find_sites(model, targets)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in before.items()}
    plain = tiny_model(kind, seed=9, **changes)
    plain.load_state_dict(state)
    assert relative_error(logits(plain), logits(model)) <= 1e-5


def test_the_merged_weight_is_w_plus_b_a_by_hand() -> None:
    for kind, name in (("llama", "model.layers.0.self_attn.k_proj"), ("gpt2", "transformer.h.0.attn.c_attn")):
        model = move(attach(tiny_model(kind), LoraConfig(r=2, alpha=4)))
        layer, delta = hosts(model)[name].base, hosts(model)[name].deltas["default"]
        change = 2 * delta.B @ delta.A  # type: ignore[operator]
        wanted = layer.weight + (change.T if isinstance(layer, Conv1D) else change)  # type: ignore[operator]
        assert relative_error(merged_state(model)[f"{name}.weight"], wanted) <= 1e-6


def test_a_tied_head_stays_tied_unless_a_delta_sits_on_it(model: Any) -> None:
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    state = merged_state(move(attach(model, SMALL)))
    assert state[embedding].data_ptr() == state[head].data_ptr()
    weight = model.get_input_embeddings().weight
    detach(model)
    move(attach(model, SMALL, targets=("lm_head",)))
    state = merged_state(model)
    delta = hosts(model)["lm_head"].deltas["default"]
    assert torch.equal(state[embedding], weight)
    assert relative_error(state[head], weight + 2 * delta.B @ delta.A) <= 1e-6  # type: ignore[operator]


def test_merging_a_bf16_base_gives_fp32_by_default_and_loses_nothing_of_the_delta() -> None:
    model = move(attach(tiny_model().bfloat16(), SMALL))
    state = merged_state(model)
    assert {t.dtype for t in state.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj"
    layer, delta = hosts(model)[name].base, hosts(model)[name].deltas["default"]
    wanted = layer.weight.float() + 2 * delta.B @ delta.A  # type: ignore[operator]
    assert relative_error(state[f"{name}.weight"], wanted) <= 1e-6
    assert {t.dtype for t in merged_state(model, dtype=torch.bfloat16).values()} == {torch.bfloat16}


def test_deltas_that_are_off_are_not_merged(model: Any) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    perturbed("lora", model)
    with deltas_off(model):
        state = merged_state(model)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_what_a_merged_state_holds_shares_no_memory_with_the_model() -> None:
    model = perturbed("lora", tiny_model(attention_bias=True))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for tensor in merged_state(model).values():
        tensor.add_(1)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
