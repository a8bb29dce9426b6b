"""Which sites targets and patterns mean, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach
from graftlm.model.registry import hosts
from graftlm.model.sites import config_at, find_sites
from graftlm.testing import tiny_model
from tests.errors import raises

pytestmark = pytest.mark.versions

LINEAR = [f"self_attn.{n}_proj" for n in "qkvo"] + [
    f"mlp.{n}_proj" for n in ("gate", "up", "down")
]  # the seven of a Llama block, in the order of the model
ALL = [f"model.layers.{i}.{name}" for i in (0, 1) for name in LINEAR]
SMALL = LoraConfig(r=2, alpha=4)


def test_a_suffix_begins_at_a_dot(model: Any) -> None:
    assert find_sites(model, ("q_proj", "mlp.down_proj")) == [
        n for n in ALL if n.endswith(("self_attn.q_proj", "mlp.down_proj"))
    ]
    assert find_sites(model, ("model.layers.1.mlp.up_proj",)) == ["model.layers.1.mlp.up_proj"]
    with raises("target/no-layer-matches", match="'proj'"):
        find_sites(model, ("proj",))  # the end of every name, but from no dot on


def test_a_regular_expression_is_for_the_whole_name(model: Any) -> None:
    assert find_sites(model, r".*\.1\..*(q|v)_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with raises("target/no-layer-matches"):
        find_sites(model, "q_proj")
    with raises("target/invalid-pattern"):
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
    with raises("target/no-layer-matches") as raised:
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
    with raises("target/layer-of-other-kind", match=rf"{target!r} is a {kind} .*can sit on Linear, Conv1D"):
        find_sites(model, (target,), ("linear",))


def test_a_subclass_of_a_linear_layer_may_compute_otherwise_and_is_not_taken(model: Any) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.model.layers[0].mlp.up_proj = Scaled(32, 48)
    assert find_sites(model, "all-linear") == [n for n in ALL if n != "model.layers.0.mlp.up_proj"]


def test_empty_targets_are_refused(model: Any) -> None:
    with raises("target/no-layer-matches", match="linear or embedding"):
        attach(model, SMALL, targets=())


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
