"""Surgery: where deltas go, what is refused, and that everything comes back as it was."""

from typing import Any

import pytest
import torch
from torch import nn

from graftlm.deltas.lora import LoraConfig
from graftlm.deltas.prefix import PrefixConfig
from graftlm.model.attach import attach, detach
from graftlm.model.hosts import Host
from graftlm.model.registry import attachment, hosts, trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import move
from tests.errors import raises
from tests.peers import relative_error

pytestmark = pytest.mark.versions

LINEAR = [f"self_attn.{n}_proj" for n in "qkvo"] + [
    f"mlp.{n}_proj" for n in ("gate", "up", "down")
]  # the seven of a Llama block, in the order of the model
ALL = [f"model.layers.{i}.{name}" for i in (0, 1) for name in LINEAR]
SMALL = LoraConfig(r=2, alpha=4)


def untouched(model: Any, modules: dict[str, Any], weights: dict[str, Any]) -> bool:
    """Whether the model has these very modules and these very weights, and no delta."""
    now = dict(model.named_modules())
    return (
        now.keys() == modules.keys()
        and all(now[key] is modules[key] for key in modules)
        and all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
        and not attachment(model).configs
    )


@pytest.mark.parametrize(
    ("patterns", "code", "words"),
    [
        (
            {"qproj": {"r": 2}},
            "target/no-site-matches",
            ["'qproj' matches none of the 14 sites", "model.layers.0.self_attn.q_proj"],
        ),
        ({"lm_head": {"r": 2}}, "target/no-site-matches", ["'lm_head' matches none"]),
        ({"q_proj": {"rank": 2}}, "target/unknown-pattern-key", ["'rank'", "alpha"]),
        ({"q_proj": {"targets": "x"}}, "target/unknown-pattern-key", ["'targets'", "no pattern can"]),
        ({"q_proj": {"method": "lora"}}, "target/unknown-pattern-key", ["'method'"]),
        ({"(": {"r": 2}}, "target/invalid-pattern", ["no regular expression"]),
        ({"q_proj": {"r": 0}}, "recipe/invalid-value", ["patterns: 'q_proj'", "r: ", "greater than 0"]),
        ({r".*\.1\.mlp\.down_proj": {"r": "four"}}, "recipe/invalid-value", ["r: ", "'four'"]),
    ],
)
def test_a_pattern_that_is_wrong_is_refused_and_leaves_the_model_as_it_was(
    model: Any, patterns: dict[str, Any], code: str, words: list[str]
) -> None:
    modules, weights = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with raises(code) as raised:
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
    with raises("target/invalid-name"):
        attach(model, SMALL, name=name)
    assert not hosts(model)


def test_a_name_that_is_taken_is_refused(model: Any) -> None:
    attach(model, SMALL, name="mine")
    with raises("target/name-taken", match="'mine'"):
        attach(model, SMALL, name="mine")


def test_an_unknown_init_is_refused(model: Any) -> None:
    with raises("target/unknown-init", match="'zeros' .*Did you mean 'zero'"):
        attach(model, LoraConfig(init="zeros"))
    assert not hosts(model)


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
    mask = seen.abs() > 1e-3
    assert 0.3 < float(mask.float().mean()) < 0.7, "each element is dropped or kept by itself"
    assert relative_error(seen, 2 * x[:, :4] * mask) <= 1e-5, "what is kept is scaled by 1 / (1 - p)"


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
