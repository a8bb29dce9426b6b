"""A GGUF adapter is for the weights that llama.cpp's converter writes: what it holds against the converter's equation.

The converter's equations stand here once more, in numpy and from its source (conversion/*.py in ggml-org/llama.cpp):
converted(W + s B A) - converted(W) is what the adapter's factors must multiply to, tensor by tensor.
"""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from graftlm.adapters.export.export import export
from graftlm.adapters.export.lint import lint
from graftlm.adapters.export.llama_cpp import ARCHITECTURES
from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach
from graftlm.model.registry import hosts
from graftlm.model.state_dict import merged_state
from graftlm.testing.deltas import move
from graftlm.testing.tiny import TINY, tiny_gpt2, tiny_model
from tests.architectures import build
from tests.errors import raises

ARCH = {
    "afmoe": "AFMOE",
    "apertus": "APERTUS",
    "arcee": "ARCEE",
    "bamba": "GRANITE_HYBRID",
    "bloom": "BLOOM",
    "cohere": "COMMAND_R",
    "cohere2": "COHERE2",
    "deepseek_v2": "DEEPSEEK2",
    "deepseek_v3": "DEEPSEEK2",
    "dots1": "DOTS1",
    "ernie4_5": "ERNIE4_5",
    "ernie4_5_moe": "ERNIE4_5_MOE",
    "exaone4": "EXAONE4",
    "exaone_moe": "EXAONE_MOE",
    "falcon": "FALCON",
    "falcon_mamba": "MAMBA",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "glm": "CHATGLM",
    "glm4": "GLM4",
    "glm4_moe": "GLM4_MOE",
    "gpt2": "GPT2",
    "gpt_bigcode": "STARCODER",
    "gpt_neox": "GPTNEOX",
    "gpt_oss": "GPT_OSS",
    "granite": "GRANITE",
    "granitemoe": "GRANITE_MOE",
    "granitemoehybrid": "GRANITE_HYBRID",
    "granitemoeshared": "GRANITE_MOE",
    "hunyuan_v1_dense": "HUNYUAN_DENSE",
    "jais2": "JAIS2",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2MOE",
    "llama": "LLAMA",
    "llama4_text": "LLAMA4",
    "mamba": "MAMBA",
    "mamba2": "MAMBA2",
    "minicpm3": "MINICPM3",
    "ministral3": "MISTRAL3",
    "mistral": "LLAMA",
    "mixtral": "LLAMA",
    "mpt": "MPT",
    "nemotron": "NEMOTRON",
    "olmo": "OLMO",
    "olmo2": "OLMO2",
    "olmo3": "OLMO2",
    "olmoe": "OLMOE",
    "phi": "PHI2",
    "phi3": "PHI3",
    "phimoe": "PHIMOE",
    "qwen2": "QWEN2",
    "qwen2_moe": "QWEN2MOE",
    "qwen3": "QWEN3",
    "qwen3_5_text": "QWEN35",
    "qwen3_moe": "QWEN3MOE",
    "qwen3_next": "QWEN3NEXT",
    "seed_oss": "SEED_OSS",
    "smollm3": "SMOLLM3",
    "solar_open": "GLM4_MOE",
    "stablelm": "STABLELM",
    "starcoder2": "STARCODER2",
    "youtu": "DEEPSEEK2",
}
"""Model type -> `model_arch` of the class that converts it, as gguf has it."""

PERMUTED = {
    "arcee",
    "bamba",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "llama",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo",
    "smollm3",
}
"""The converter's LlamaModel with `undo_permute`, what inherits from it, and OlmoModel."""

LATENT_TYPES = ("deepseek_v2", "deepseek_v3", "minicpm3", "youtu")


def untied(kind: str, **changes: Any) -> Any:
    return build(kind, **({"tie_word_embeddings": False} | changes))


def permuted(W: np.ndarray, heads: int) -> np.ndarray:
    return W.reshape(heads, 2, W.shape[0] // heads // 2, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape)


def with_tiled_values(last: str, config: Any, W: np.ndarray) -> np.ndarray:
    """Qwen 3.5: value heads, a group for each key head, are written head by head over the groups."""
    groups, values = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads

    def tiled(part: np.ndarray, axis: int, width: int) -> np.ndarray:
        shape = part.shape[:axis] + (groups, values, width) + part.shape[axis + 1 :]
        return part.reshape(shape).swapaxes(axis, axis + 1).reshape(part.shape)

    if last == "in_proj_qkv":
        before = 2 * groups * config.linear_key_head_dim
        return np.concatenate([W[:before], tiled(W[before:], 0, config.linear_value_head_dim)])
    if last == "out_proj":
        return tiled(W, 1, config.linear_value_head_dim)
    return tiled(W, 0, config.linear_value_head_dim if last == "in_proj_z" else 1)


def converted(kind: str, config: Any, name: str, W: np.ndarray) -> dict[str, np.ndarray]:
    """What the converter writes for the weight of a module as transformers' files have it: tensor -> array."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCH[kind]], config.num_hidden_layers)
    last = name.rpartition(".")[2]
    if kind == "gpt2" and last in ("c_attn", "c_proj", "c_fc"):
        W = W.transpose(1, 0)
    if kind in PERMUTED and last == "q_proj":
        W = permuted(W, config.num_attention_heads)
    if kind in PERMUTED and last == "k_proj":
        W = permuted(W, config.num_key_value_heads)
    if kind in ("bloom", "gpt_neox") and last == "query_key_value":
        qkv = W.reshape(config.num_attention_heads, 3, -1, W.shape[1])
        W = np.concatenate([qkv[:, part].reshape(-1, W.shape[1]) for part in range(3)])
    if kind == "falcon" and last == "query_key_value":
        heads, groups = config.num_attention_heads, config.num_kv_heads
        if config.multi_query and not config.new_decoder_architecture:
            groups = 1
        qkv = W.reshape(groups, heads // groups + 2, config.hidden_size // heads, config.hidden_size)
        parts = qkv[:, :-2], qkv[:, [-2]], qkv[:, [-1]]
        W = np.concatenate([part.reshape(-1, config.hidden_size) for part in parts])
    if kind == "qwen3_5_text" and ".linear_attn." in name:
        W = with_tiled_values(last, config, W)
    if last == "in_proj_qkvz":
        layer, groups = name.split(".")[2], config.linear_num_key_heads
        sizes = [config.linear_key_head_dim] * 2
        sizes += [config.linear_num_value_heads // groups * config.linear_value_head_dim] * 2
        by_head = W.transpose(1, 0).reshape(-1, groups, sum(sizes))
        parts = np.split(by_head, np.cumsum(sizes)[:-1], axis=-1)
        q, k, v, z = (part.reshape(config.hidden_size, -1) for part in parts)
        qkv = np.concatenate([q, k, v], axis=-1).transpose(1, 0)
        return {f"blk.{layer}.attn_qkv.weight": qkv, f"blk.{layer}.attn_gate.weight": z.transpose(1, 0)}
    if last == "input_linear":
        layer = name.split(".")[2]
        gate, up = np.split(W, 2)
        return {f"blk.{layer}.ffn_gate_shexp.weight": gate, f"blk.{layer}.ffn_up_shexp.weight": up}
    there = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
    assert there is not None, f"gguf has no name for {name} of {kind}"
    return {there: W}


def stored(folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The architecture that a GGUF adapter names, and tensor of the base -> the change that llama.cpp makes of it."""
    reader = gguf.GGUFReader(str(folder / "adapter.gguf"))
    tensors = {t.name: np.array(t.data, dtype=np.float64) for t in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    changes = {}
    for name in {key.rpartition(".")[0] for key in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = alpha / B.shape[1]  # get_scale in llama-adapter.h
        changes[name] = scale * (A @ B.T if name == "token_embd.weight" else B @ A)  # a row of A for each token
    return reader.fields["general.architecture"].contents(), changes


def is_what_the_converter_makes(kind: str, model: Any, folder: Path) -> None:
    export(model, folder, to="gguf")
    arch, changes = stored(folder)
    assert arch == gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCH[kind]]]
    after, before, merged = {}, {}, merged_state(model)
    for name, host in hosts(model).items():
        after |= converted(kind, model.config, name, merged[f"{name}.weight"].double().numpy())
        before |= converted(kind, model.config, name, host.base.weight.detach().double().numpy())
    assert changes.keys() == after.keys()
    for tensor, change in changes.items():
        expected = after[tensor] - before[tensor]
        assert change.shape == expected.shape, tensor
        assert np.abs(expected).max() > 0.01
        assert np.abs(change - expected).max() <= 1e-5 * np.abs(expected).max(), tensor


def with_lora(model: Any, *targets: str) -> Any:
    return move(attach(model, LoraConfig(r=4, alpha=6, targets=targets or "all-linear")), scale=0.3)


REORDERED = sorted(PERMUTED | {"bloom", "falcon", "gpt_neox", "qwen3_5_text", "qwen3_next"})


@pytest.mark.parametrize("kind", REORDERED)
def test_b_follows_the_rows_of_the_converter(kind: str, tmp_path: Path) -> None:
    is_what_the_converter_makes(kind, with_lora(untied(kind)), tmp_path / "out")


@pytest.mark.sampled
@pytest.mark.parametrize("kind", sorted(ARCH.keys() - REORDERED))
def test_b_stays_where_the_converter_leaves_the_rows(kind: str, tmp_path: Path) -> None:
    targets = ("o_proj", "gate_proj", "up_proj", "down_proj") if kind in LATENT_TYPES else ()
    is_what_the_converter_makes(kind, with_lora(untied(kind), *targets), tmp_path / "out")


def test_every_architecture_that_is_known_was_compared_or_is_refused() -> None:
    refused = {kind for kind, known in ARCHITECTURES.items() if isinstance(known, str)}
    assert ARCHITECTURES.keys() == ARCH.keys() | refused


@pytest.mark.parametrize(
    "changes",
    [
        {"multi_query": True, "new_decoder_architecture": False},  # one key for all heads: Falcon 7B
        {"multi_query": False, "new_decoder_architecture": False},  # one for each: Falcon RW
        {"new_decoder_architecture": True, "num_kv_heads": 2},  # one for two: Falcon 40B
    ],
)
def test_falcon_has_a_key_for_all_heads_or_for_groups_of_them(changes: dict[str, Any], tmp_path: Path) -> None:
    is_what_the_converter_makes("falcon", with_lora(build("falcon", **changes)), tmp_path / "out")


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "qwen2", "gpt2"])
def test_embeddings_and_head_of_an_untied_untied(kind: str, tmp_path: Path) -> None:
    ends = {"gpt_neox": ("embed_in", "lm_head"), "gpt2": ("wte", "lm_head")}.get(kind, ("embed_tokens", "lm_head"))
    is_what_the_converter_makes(kind, with_lora(untied(kind), *ends), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "arch", "tensors"),
    [
        ({"num_local_experts": 0, "num_experts_per_tok": 0}, "granite", ("ffn_gate", "ffn_up", "ffn_down")),
        ({}, "granitemoe", ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")),
    ],
)
def test_granite_4_without_mamba_is_another_architecture(
    changes: dict[str, Any], arch: str, tensors: tuple[str, ...], tmp_path: Path
) -> None:
    model = with_lora(untied("granitemoehybrid", layer_types=["full_attention"] * 2, **changes))
    export(model, tmp_path / "out", to="gguf")
    architecture, made = stored(tmp_path / "out")
    assert architecture == arch
    shared = hosts(model)["model.layers.1.shared_mlp.input_linear"]
    (delta,) = shared.on()
    change = (delta.scale * delta.B.double() @ delta.A.double()).detach().numpy()
    gate, up, _ = (made[f"blk.1.{tensor}.weight"] for tensor in tensors)
    assert np.allclose(np.concatenate([gate, up]), change, atol=1e-5 * np.abs(change).max())


# What is refused, by the export and by the verdict ---------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "a tied head": (
        lambda: with_lora(tiny_model(), "lm_head"),
        r"lm_head: the head is tied to the embeddings, so the base in GGUF has no output.weight",
    ),
    "tied embeddings": (
        lambda: with_lora(tiny_model(), "embed_tokens"),
        r"model.embed_tokens: the embeddings are tied to the head, and llama.cpp would apply the delta there too",
    ),
    "a head that llama.cpp leaves out": (
        lambda: with_lora(untied("gemma2"), "lm_head"),
        r"lm_head: llama.cpp takes no adapter on the head of gemma2",
    ),
    "positions": (lambda: with_lora(tiny_gpt2(), "wpe"), r"wpe: llama.cpp has no layer of gpt2 for it"),
    "queries and keys by way of a latent vector": (
        lambda: with_lora(untied("deepseek_v3"), "q_b_proj", "o_proj"),
        r"q_b_proj: llama.cpp multiplies by this layer of deepseek2 without adapters.*--to merged",
    ),
    "MiniCPM 3": (lambda: with_lora(untied("minicpm3")), r"llama.cpp multiplies by this layer of minicpm3 without"),
    "dense layers of Qwen MoE": (
        lambda: with_lora(untied("qwen3_moe", mlp_only_layers=[0]), "up_proj"),
        r"layers.0.mlp.up_proj: llama.cpp has no layer of qwen3moe for it",
    ),
    "GPT-BigCode with a key for each head": (
        lambda: with_lora(untied("gpt_bigcode", multi_query=False)),
        r"multi_query only",
    ),
    "GLM-4 with positions in several dimensions": (
        lambda: with_lora(
            untied("glm4", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
        ),
        r"reorders the queries and keys of GLM-4",
    ),
    "BitNet": (lambda: with_lora(untied("bitnet")), r"BitNet's weights to three values"),
    "an architecture whose converter was not read": (
        lambda: with_lora(untied("gptj")),
        r"the weights of 'gptj' is not known here.*--to merged",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_not_apply_is_refused_by_the_export_and_by_the_verdict(case: str, tmp_path: Path) -> None:
    made, reason = REFUSED[case]
    model = made()
    with raises("target/unsupported-by-gguf", match=reason):
        export(model, tmp_path / "gguf", to="gguf")
    assert not (tmp_path / "gguf").exists()
    export(model, tmp_path / "lora", to="plain-lora")
    verdicts = {verdict.server: verdict for verdict in lint(tmp_path / "lora")}
    for server in ("llama.cpp", "Ollama"):
        assert not verdicts[server].accepts
        assert any(re.search(reason, part) for part in verdicts[server].why)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "qwen2_moe"])
def test_what_llama_cpp_applies_has_the_verdict_yes(kind: str, tmp_path: Path) -> None:
    export(with_lora(untied(kind)), tmp_path / "lora", to="plain-lora")
    assert {verdict.server: verdict.accepts for verdict in lint(tmp_path / "lora")}["llama.cpp"]


def test_a_classifier_is_no_model_of_llama_cpp(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **TINY))
    model = attach(model.requires_grad_(False), LoraConfig(r=4, targets=("q_proj",)))
    with raises("target/unsupported-by-gguf", match="LlamaForSequenceClassification"):
        export(model, tmp_path / "out", to="gguf")
    export(model, tmp_path / "lora", to="plain-lora")
    verdicts = {verdict.server: verdict for verdict in lint(tmp_path / "lora")}
    assert not verdicts["llama.cpp"].accepts
    assert "for a LlamaForSequenceClassification" in verdicts["llama.cpp"].why[0]
