"""Surgery: where deltas go, what is refused, and that everything comes back as it was."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftlm.deltas.lora import LoraConfig
from graftlm.deltas.prefix import PrefixConfig
from graftlm.errors import RecipeError, TargetError
from graftlm.model.layers.attach import (
    Host,
    activate,
    attach,
    attachment,
    base_parameters,
    config_at,
    deltas_off,
    deltas_still,
    detach,
    find_sites,
    hosts,
    merged_state,
    trainable,
)
from graftlm.testing import tiny_model
from graftlm.testing.deltas import logits, perturbed
from tests.peers import relative_error

pytestmark = pytest.mark.versions

LINEAR = [f"self_attn.{n}_proj" for n in "qkvo"] + [
    f"mlp.{n}_proj" for n in ("gate", "up", "down")
]  # the seven of a Llama block, in the order of the model
ALL = [f"model.layers.{i}.{name}" for i in (0, 1) for name in LINEAR]
SMALL = LoraConfig(r=2, alpha=4)


def move(model: Any, seed: int = 1) -> Any:
    """Every trainable tensor away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def untouched(model: Any, modules: dict[str, Any], weights: dict[str, Any]) -> bool:
    """Whether the model has these very modules and these very weights, and no delta."""
    now = dict(model.named_modules())
    return (
        now.keys() == modules.keys()
        and all(now[key] is modules[key] for key in modules)
        and all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
        and not attachment(model).configs
    )


# Targets ---------------------------------------------------------------------------------------------------------


def test_a_suffix_begins_at_a_dot(model: Any) -> None:
    assert find_sites(model, ("q_proj", "mlp.down_proj")) == [
        n for n in ALL if n.endswith(("self_attn.q_proj", "mlp.down_proj"))
    ]
    assert find_sites(model, ("model.layers.1.mlp.up_proj",)) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(TargetError, match="'proj' matches no layer"):
        find_sites(model, ("proj",))  # the end of every name, but from no dot on


def test_a_regular_expression_is_for_the_whole_name(model: Any) -> None:
    assert find_sites(model, r".*\.1\..*(q|v)_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with pytest.raises(TargetError, match="matches no layer"):
        find_sites(model, "q_proj")
    with pytest.raises(TargetError, match="no regular expression"):
        find_sites(model, "(q_proj")


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_is_every_linear_layer_but_the_head(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    assert find_sites(model, "all-linear") == ALL
    assert find_sites(model, ("lm_head",)) == ["lm_head"]


def test_all_linear_leaves_out_the_head_even_where_a_delta_sits_on_it(model: Any) -> None:
    attach(model, SMALL, targets=("lm_head",), name="head")
    assert find_sites(model, "all-linear") == ALL


def test_all_linear_of_a_model_with_transposed_layers() -> None:
    assert find_sites(tiny_model("gpt2"), "all-linear") == [
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_targets_that_match_nothing_name_the_nearest_and_list_what_there_is(model: Any) -> None:
    with pytest.raises(TargetError) as raised:
        attach(model, SMALL, targets=("q_proj", "v_prj"))
    message = str(raised.value)
    assert "'v_prj' matches no layer" in message
    assert "Did you mean 'v_proj'" in message
    assert "model.layers.*.self_attn.q_proj (2)" in message
    assert "lm_head (1)" in message
    assert not hosts(model), "nothing may be attached for the target that did match"


@pytest.mark.parametrize(
    ("target", "kind"), [("embed_tokens", "Embedding"), ("norm", "LlamaRMSNorm"), ("mlp", "LlamaMLP")]
)
def test_a_target_of_an_unsupported_kind_is_refused_with_the_reason(model: Any, target: str, kind: str) -> None:
    with pytest.raises(TargetError, match=rf"{target!r} is a {kind} .*can sit on Linear, Conv1D"):
        find_sites(model, (target,), ("linear",))


def test_a_subclass_of_a_linear_layer_may_compute_otherwise_and_is_not_taken(model: Any) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.model.layers[0].mlp.up_proj = Scaled(32, 48)
    assert find_sites(model, "all-linear") == [n for n in ALL if n != "model.layers.0.mlp.up_proj"]


def test_empty_targets_are_refused(model: Any) -> None:
    with pytest.raises(TargetError, match="matches no linear or embedding"):
        attach(model, SMALL, targets=())


# Patterns --------------------------------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_counts(model: Any) -> None:
    config = LoraConfig(r=4, alpha=6, patterns={r"layers\.1\..*": {"r": 2}, "q_proj": {"r": 3, "alpha": 1}})
    attach(model, config)
    found = {name: host.deltas["default"].config for name, host in hosts(model).items()}  # type: ignore[union-attr]
    assert (found["model.layers.0.self_attn.q_proj"].r, found["model.layers.0.self_attn.q_proj"].alpha) == (3, 1)
    assert (found["model.layers.1.self_attn.q_proj"].r, found["model.layers.1.self_attn.q_proj"].alpha) == (2, 6)
    assert (found["model.layers.0.self_attn.k_proj"].r, found["model.layers.0.self_attn.k_proj"].alpha) == (4, 6)


def test_a_pattern_is_for_the_end_of_a_name_from_a_dot_on() -> None:
    config = LoraConfig(r=4, patterns={"proj": {"r": 1}, "up_proj": {"r": 2}})
    assert config_at(config, "a.up_proj").r == 2  # type: ignore[attr-defined]
    assert config_at(config, "a.proj").r == 1  # type: ignore[attr-defined]
    assert config_at(config, "a.up_proj.b") == config


def test_a_pattern_may_have_flags_and_groups_of_its_own() -> None:
    config = LoraConfig(r=4, patterns={"(?i)UP_PROJ": {"r": 1}, r"(q|k)\.\1": {"r": 2}})
    assert config_at(config, "layers.0.up_proj").r == 1  # type: ignore[attr-defined]
    assert config_at(config, "layers.0.q.q").r == 2  # type: ignore[attr-defined]
    assert config_at(config, "layers.0.q.k") == config


@pytest.mark.parametrize(
    ("patterns", "error", "words"),
    [
        ({"qproj": {"r": 2}}, TargetError, ["'qproj' matches none of the 14 sites", "model.layers.0.self_attn.q_proj"]),
        ({"lm_head": {"r": 2}}, TargetError, ["'lm_head' matches none"]),
        ({"q_proj": {"rank": 2}}, TargetError, ["'rank'", "alpha"]),
        ({"q_proj": {"targets": "x"}}, TargetError, ["'targets'", "no pattern can"]),
        ({"q_proj": {"method": "lora"}}, TargetError, ["'method'"]),
        ({"(": {"r": 2}}, TargetError, ["no regular expression"]),
        ({"q_proj": {"r": 0}}, RecipeError, ["patterns: 'q_proj'", "r: ", "greater than 0"]),
        ({r".*\.1\.mlp\.down_proj": {"r": "four"}}, RecipeError, ["r: ", "'four'"]),
    ],
)
def test_a_pattern_that_is_wrong_is_refused_and_leaves_the_model_as_it_was(
    model: Any, patterns: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    modules, weights = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error) as raised:
        attach(model, LoraConfig(patterns=patterns))
    for word in words:
        assert word in str(raised.value)
    assert untouched(model, modules, weights)


# Attaching and detaching -----------------------------------------------------------------------------------------


def test_a_fresh_delta_is_active_and_alone_trainable(model: Any) -> None:
    model.requires_grad_(True)
    assert attach(model, SMALL) is model
    assert list(hosts(model)) == ALL
    assert all(host.active == ("default",) for host in hosts(model).values())
    assert sorted(trainable(model)) == sorted(f"{n}.deltas.default.{k}" for n in ALL for k in "AB")


@pytest.mark.parametrize("name", ["", "a.b", "-a", "a b", "x" * 129, "a/b"])
def test_a_name_that_cannot_name_a_module_is_refused(model: Any, name: str) -> None:
    with pytest.raises(TargetError, match="cannot name a delta"):
        attach(model, SMALL, name=name)
    assert not hosts(model)


def test_a_name_that_is_taken_is_refused(model: Any) -> None:
    attach(model, SMALL, name="mine")
    with pytest.raises(TargetError, match="'mine' on this model already"):
        attach(model, SMALL, name="mine")


def test_an_unknown_init_is_refused(model: Any) -> None:
    with pytest.raises(TargetError, match="init: 'zeros' is unknown. Did you mean 'zero'"):
        attach(model, LoraConfig(init="zeros"))
    assert not hosts(model)


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
    with pytest.raises(TargetError, match="no delta 'poets'.*'poet'"):
        activate(model, "poets")
    with pytest.raises(TargetError, match="no delta 'poets'.*'poet'"):
        detach(model, "poets")


def test_detach_puts_back_the_very_modules_and_what_was_trainable() -> None:
    model = tiny_model()
    model.model.norm.weight.requires_grad_(True)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    modules, weights = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    wanted = set(trainable(model))
    attach(model, SMALL, name="one")
    attach(model, SMALL, name="two", targets=("up_proj",))
    move(model)
    detach(model, "one")
    assert list(hosts(model)) == [n for n in ALL if n.endswith("up_proj")]
    assert set(trainable(model)) == {f"{n}.deltas.two.{k}" for n in hosts(model) for k in "AB"}
    detach(model, "two")
    assert untouched(model, modules, weights)
    assert set(trainable(model)) == wanted


def test_detach_takes_all_off_where_no_name_is_given(model: Any) -> None:
    modules, weights = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    attach(model, SMALL, name="one")
    attach(model, SMALL, name="two", targets=("lm_head", "q_proj"))
    detach(model)
    assert untouched(model, modules, weights)
    attach(model, SMALL, name="one")  # the name is free again
    assert list(attachment(model).configs) == ["one"]


def test_base_parameters_have_their_own_names_with_deltas_on(model: Any) -> None:
    wanted = {name: id(p) for name, p in model.named_parameters()}
    attach(model, SMALL)
    attach(model, SMALL, name="head", targets=("lm_head",))
    assert {name: id(p) for name, p in base_parameters(model).items()} == wanted


# Off and on ------------------------------------------------------------------------------------------------------


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


# Dropout ---------------------------------------------------------------------------------------------------------


def test_a_delta_takes_the_mode_of_its_layer_so_that_nothing_drops_in_evaluation(model: Any) -> None:
    attach(model, LoraConfig(r=2, dropout=0.5))
    assert not any(module.training for module in model.modules())
    model.train()
    attach(model, LoraConfig(r=2), name="two")
    assert all(module.training for module in model.modules())


def test_dropout_acts_in_training_only_and_on_the_deltas_input_only() -> None:
    layer = nn.Linear(6, 4)
    parent = nn.ModuleDict({"only": layer})
    attach(parent, LoraConfig(r=6, alpha=6, dropout=0.5, targets=("only",)))
    host = parent["only"]
    assert isinstance(host, Host)
    delta = host.deltas["default"]
    with torch.no_grad():  # B A = the first four rows of the unit matrix: what the delta adds is the x that it saw
        delta.A.copy_(torch.eye(6))  # type: ignore[union-attr, operator]
        delta.B.copy_(torch.eye(6)[:4])  # type: ignore[union-attr, operator]
    x = 1 + torch.rand(50, 6)
    with torch.no_grad():
        torch.manual_seed(0)
        parent.train()
        seen = host(x) - layer(x)
        parent.eval()
        assert relative_error(host(x) - layer(x), x[:, :4]) <= 1e-5
    kept = seen.abs() > 1e-3
    assert 0.3 < float(kept.float().mean()) < 0.7, "each element is dropped or kept by itself"
    assert relative_error(seen, 2 * x[:, :4] * kept) <= 1e-5, "what is kept is scaled by 1 / (1 - p)"


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


# Merging ---------------------------------------------------------------------------------------------------------


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


# Prefixes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # from transformers 5.24 on, and before
def test_positions_continue_behind_the_cache_and_the_prefix(name: str, model: Any) -> None:
    """For a decoder of either version, whichever is installed, in calls that give no positions."""

    class Decoder(nn.Module):
        def forward(self, input_ids: Any, position_ids: Any, **kwargs: Any) -> Any:
            return position_ids

    class Cache:
        def get_seq_length(self) -> int:
            return 7

    attach(model, PrefixConfig(p=5))
    (host,) = hosts(model).values()
    decoder = Decoder()
    decoder.register_forward_pre_hook(host._prepare, with_kwargs=True)
    ids = torch.ones(2, 3, dtype=torch.long)
    assert decoder(input_ids=ids, **{name: Cache()}).tolist() == [[12, 13, 14]]
    assert decoder(input_ids=ids, **{name: None}).tolist() == [[5, 6, 7]]
