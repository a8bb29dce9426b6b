"""Reported mistakes of packing and of its proof: architectures that were let through, refused or crashed wrongly."""

from typing import Any

import pytest
import torch

from graftlm.model.sites import decoder_of, transformer_layers
from graftlm.passes.packed_attention import packed_attention
from graftlm.passes.packing_check import check_forward, check_packed_rows
from graftlm.testing import tiny_model
from tests.architectures import build
from tests.errors import raises
from tests.passes.test_packing_check import DTYPES, ids, made, rows

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["phi3", "llama", "qwen3"])
def test_rotary_factors_of_the_longest_row_of_a_pack_are_found(kind: str, dtype: torch.dtype) -> None:
    """Two short rows are right; the row is wrong beside one above the limit, whichever of the two is the first."""
    rope = LONGROPE | ({"partial_rotary_factor": 1.0} if kind == "phi3" else {"original_max_position_embeddings": 16})
    limits = {"original_max_position_embeddings": 16} if kind == "phi3" else {}
    model = made(kind, dtype, max_position_embeddings=64, rope_parameters=rope, **limits)
    short, long = ids(9, 1), ids(30, 2)
    check_packed_rows(model, short, ids(12, 3), longest=16)
    for first, second in ((short, long), (long, short)):
        with raises("training/cannot-pack", match="longrope, dynamic"):
            check_packed_rows(model, first, second, longest=30)
    with raises("training/cannot-pack", match="where a row of 64 tokens lies in the pack"):
        check_packed_rows(model, short, ids(12, 3))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_dynamic_scaling_is_right_up_to_the_models_own_length_and_refused_beyond(kind: str) -> None:
    model = made(kind, max_position_embeddings=24, rope_parameters=DYNAMIC)
    check_packed_rows(model, *rows())
    with raises("training/cannot-pack", match="longrope, dynamic"):
        check_packed_rows(model, *rows(), longest=40)


def test_attention_in_chunks_is_refused_for_rows_that_are_longer() -> None:
    model = tiny_model("llama4_text", num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=16)
    check_packed_rows(model, *rows(), longest=16)
    with raises("training/cannot-pack", match=r"chunks of 16 tokens, and rows may have 40\."):
        check_packed_rows(model, ids(9, 0), ids(40, 1), longest=40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "llama", "gpt2"])
def test_numbers_of_tokens_of_an_expert_are_no_leak(kind: str, dtype: torch.dtype) -> None:
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    model = made(kind, dtype, **experts)
    for seed in range(6):
        check_packed_rows(model, *rows(seed, 9 + seed, 14 + 5 * seed), sharing=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mask_of_the_models_own_that_packing_leaves_out_is_found(dtype: torch.dtype) -> None:
    model = tiny_model("doge", keep_window_size=4).to(dtype)
    with raises("training/cannot-pack", match="differs from the same row alone"):
        check_packed_rows(model, ids(30, 1), ids(40, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_that_multiplies_by_a_hundredth_is_proved_or_refused_in_half_precision(dtype: torch.dtype) -> None:
    sizes = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
    model = tiny_model("falcon_h1", lm_head_multiplier=0.0195, mamba_chunk_size=16, **sizes).to(dtype)
    check_forward(model, rows()[1])
    assert model.__dict__["graft_head"] == (pytest.approx(0.0195, rel=1e-6), None)
    model.__dict__["graft_head"] = (1.0, None)
    with raises("training/unsupported-model"):
        check_forward(model, rows()[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_states_wider_than_the_head_are_cast(dtype: torch.dtype) -> None:
    check_forward(tiny_model("mamba", state_size=8).to(dtype), rows()[1])


def test_a_decoder_is_found_where_a_class_answers_with_itself_or_with_its_head() -> None:
    text = tiny_model("llama4_text", num_local_experts=2, intermediate_size_mlp=48)
    assert text.get_decoder() is text
    assert decoder_of(text) is text.model
    check_forward(text, rows()[1])
    modern = tiny_model("modernbert-decoder", global_attn_every_n_layers=2)
    assert modern.get_decoder() is modern.get_output_embeddings()
    assert decoder_of(modern) is modern.model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}), ("xlstm", {"num_heads": 4})],
)
def test_code_that_fails_in_a_pack_is_refused_with_its_own_words(kind: str, changes: dict[str, Any]) -> None:
    model = tiny_model(kind, **changes)
    check_forward(model, rows()[1])
    with raises("training/cannot-pack", match="pack: false"):
        check_packed_rows(model, *rows())


def test_a_norm_that_takes_a_gate_keeps_its_own_code() -> None:
    model = tiny_model("mamba2", num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8, hidden_size=32)
    gated = [m for m in model.modules() if type(m).__name__.endswith("RMSNormGated")]
    assert gated
    with packed_attention(model):
        assert not any("forward" in vars(module) for module in gated)
        assert any("forward" in vars(module) for module in model.modules()), "plain norms are replaced"
    with raises("training/cannot-pack", match="with its neighbor"):
        check_packed_rows(model, *rows())


def test_a_norm_whose_gain_is_no_parameter_keeps_its_own_code() -> None:
    """Falcon-Mamba's has ones of another width than its rows."""
    model = tiny_model("falcon_mamba", state_size=8)
    check_forward(model, rows()[1])
    with raises("training/cannot-pack", match="with its neighbor"):
        check_packed_rows(model, *rows())


def test_a_head_of_another_width_than_the_hidden_states_is_refused() -> None:
    with raises("training/unsupported-model", match="output layer"):
        check_forward(tiny_model("electra", embedding_size=64), rows()[1])


def test_layers_are_the_outermost_list_of_blocks() -> None:
    """Gemma 3n has as many projections in a list as a tiny model has layers; DeepSeek has more experts than layers."""
    sizes = {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    model = tiny_model("gemma3n_text", **sizes)
    assert list(transformer_layers(model)) == ["model.layers.0", "model.layers.1"]
    check_packed_rows(model, *rows())
    model = tiny_model()
    model.model.layers[0].mlp.experts = torch.nn.ModuleList(
        torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(8)
    )
    assert list(transformer_layers(model)) == ["model.layers.0", "model.layers.1"]


def test_a_table_of_fewer_positions_than_the_config_says_is_no_reason_to_refuse() -> None:
    """Whisper's decoder has `max_target_positions`."""
    check_packed_rows(build("whisper"), *rows(), sharing=True)
