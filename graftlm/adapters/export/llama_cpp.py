"""What llama.cpp makes of a base's weights: the names of its tensors and the order of their rows, by architecture.

Its converter (conversion/*.py in ggml-org/llama.cpp) renames weights, and for some architectures it reorders rows or
splits them. A LoRA adapter in GGUF is for the converted weight: with W' = reorder(W) its B must be reorder(B), for
reorder(W + B A) = reorder(W) + reorder(B) A where only rows move. And an adapter acts on those layers alone whose
product the graph (src/models/*.cpp) makes with `build_lora_mm`; on others it is loaded and has no effect.

So there is a table. An architecture is in it if its converter and its graph were read (in November 2026), a layer if a
delta on it acts there. Everything else is refused by name.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch import cat as concatenated

from graftlm.errors import nearest

Settings = Mapping[str, Any]
"""A model's config as `config.to_dict()` has it."""

Rows = Callable[[Tensor, Settings], tuple[Tensor, ...]]
"""Rows of a weight in transformers' order -> the same rows in the order of the GGUF file, for each of its tensors."""


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF."""

    name: str
    layers: Mapping[str, str | tuple[str, ...]]
    """Module of a decoder layer -> tensor `blk.<layer>.<tensor>.weight`, or several."""
    rows: Mapping[str, Rows] = field(default_factory=dict)
    """Module of a decoder layer -> what happens to its rows, where something does."""
    columns: Mapping[str, Rows] = field(default_factory=dict)
    """The same for columns, given as rows of the transposed weight."""
    without_adapters: tuple[str, ...] = ()
    """Modules whose product the graph makes without a look at adapters."""
    head: bool = True
    """Whether a delta on the output head acts."""


# The order of rows -----------------------------------------------------------------------------------------------


def halves_to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from 0, 1 .. D/2 | D/2 .. D (transformers rotates halves) to 0, D/2, 1, D/2 + 1 .. (pairs)."""
    pairs: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    return pairs.flatten(0, 2)


def groups_to_qkv(rows: Tensor, groups: int, queries: int) -> Tensor:
    """Rows from [group, `queries` queries + key + value, D] to [all queries | all keys | all values]."""
    grouped: Tensor = rows.unflatten(0, (groups, queries + 2, -1))
    parts = (grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1])
    return concatenated([part.flatten(0, -2) for part in parts])


def groups_to_tiles(rows: Tensor, groups: int, width: int) -> Tensor:
    """Rows from [group, head, width] to [head, group, width]: ggml repeats keys for values group by group."""
    tiles: Tensor = rows.unflatten(0, (groups, -1, width)).transpose(0, 1)
    return tiles.flatten(0, 2)


def _queries(rows: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    return (halves_to_pairs(rows, settings["num_attention_heads"]),)


def _keys(rows: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    return (halves_to_pairs(rows, settings.get("num_key_value_heads") or settings["num_attention_heads"]),)


def _fused_heads(rows: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    return (groups_to_qkv(rows, settings.get("num_attention_heads") or settings["n_head"], 1),)


def _falcon(rows: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    heads = settings["num_attention_heads"]
    every_head = settings["new_decoder_architecture"] or not settings["multi_query"]
    groups = (settings.get("num_kv_heads") or heads) if every_head else 1
    return (groups_to_qkv(rows, groups, heads // groups),)


def _gate_and_up(rows: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    return rows.chunk(2)


def _values(rows: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    """The value heads of a gated delta net: one or several for a key head (Qwen 3.5)."""
    return (groups_to_tiles(rows, settings["linear_num_key_heads"], settings["linear_value_head_dim"]),)


def _value_gates(rows: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    return (groups_to_tiles(rows, settings["linear_num_key_heads"], 1),)


def _queries_keys_values(rows: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    before = 2 * settings["linear_num_key_heads"] * settings["linear_key_head_dim"]
    return (concatenated([rows[:before], *_values(rows[before:], settings)]),)


def _groups_of_four(rows: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    """Rows from [key head, query + key + values + gates] to [queries | keys | values] and [gates] (Qwen3-Next)."""
    heads, key = settings["linear_num_key_heads"], settings["linear_key_head_dim"]
    value = settings["linear_num_value_heads"] // heads * settings["linear_value_head_dim"]
    q, k, v, z = (part.flatten(0, 1) for part in rows.unflatten(0, (heads, -1)).split([key, key, value, value], 1))
    return concatenated([q, k, v]), z


# The table -------------------------------------------------------------------------------------------------------

_ROTARY = {"self_attn.q_proj": _queries, "self_attn.k_proj": _keys}
_GRANITE_ROWS = {**_ROTARY, "shared_mlp.input_linear": _gate_and_up}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_UP_DOWN = {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_DENSE = {**_ATTENTION, "mlp.gate_proj": "ffn_gate", **_UP_DOWN}
_FEED_FORWARD = {f"feed_forward.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
_GATE_IN_UP = {**_ATTENTION, "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_BLOOM = {
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_GPT2 = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_MAMBA2 = {"mixer.in_proj": "ssm_in", "mixer.out_proj": "ssm_out"}
_MAMBA = {**_MAMBA2, "mixer.x_proj": "ssm_x", "mixer.dt_proj": "ssm_dt"}
_MAMBA_BESIDE = {"mamba.in_proj": "ssm_in", "mamba.out_proj": "ssm_out"}
_LATENT = tuple(f"self_attn.{part}" for part in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
_LFM2 = {
    **{key: name for key, name in _ATTENTION.items() if key != "self_attn.o_proj"},
    "self_attn.out_proj": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
}


def _shared(module: str) -> dict[str, str | tuple[str, ...]]:
    """The experts that all tokens go through; those that a router chooses are no layers in transformers."""
    return {f"{module}.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}


def _latent_attention(name: str, *, head: bool, shared: bool = False) -> Architecture:
    """Multi-head latent attention: of the attention, only the output acts (deepseek2.cpp, minicpm3.cpp)."""
    layers = {key: name for key, name in _DENSE.items() if key not in _ATTENTION or key == "self_attn.o_proj"}
    experts = _shared("mlp.shared_experts") if shared else {}
    return Architecture(name, {**layers, **experts}, without_adapters=_LATENT, head=head)


def _granite_shared(settings: Settings) -> dict[str, str | tuple[str, ...]]:
    """Granite's `shared_mlp` stands beside experts, or in the place of the dense layers where there are none."""
    end = "_shexp" if settings.get("num_local_experts") else ""
    up: tuple[str, ...] = (f"ffn_gate{end}", f"ffn_up{end}")
    return {"shared_mlp.input_linear": up, "shared_mlp.output_linear": f"ffn_down{end}"}


def _granite_moe(settings: Settings) -> Architecture:
    return Architecture("granitemoe", {**_ATTENTION, **_granite_shared(settings)}, _GRANITE_ROWS)


def _granite_hybrid(settings: Settings) -> Architecture:
    hybrid = any(kind in ("mamba", "linear_attention") for kind in settings["layer_types"])
    name = "granitehybrid" if hybrid else "granitemoe" if settings.get("num_experts_per_tok") else "granite"
    return Architecture(name, {**_ATTENTION, **_granite_shared(settings), **_MAMBA_BESIDE}, _GRANITE_ROWS)


def _glm4(settings: Settings) -> Architecture | str:
    if "mrope_section" in (settings.get("rope_parameters") or {}):
        return "llama.cpp's converter reorders the queries and keys of GLM-4 with positions in several dimensions"
    return Architecture("glm4", _GATE_IN_UP)


def _gpt_bigcode(settings: Settings) -> Architecture | str:
    if not settings["multi_query"]:
        return "llama.cpp knows GPT-BigCode with multi_query only: it takes the keys and values for those of one head"
    return Architecture("starcoder", _GPT2)


ARCHITECTURES: dict[str, Architecture | str | Callable[[Settings], Architecture | str]] = {
    # q_proj and k_proj from halves to pairs: LlamaModel.permute, in each class that leaves `undo_permute` on; olmo.py.
    "arcee": Architecture("arcee", {**_ATTENTION, **_UP_DOWN}, _ROTARY),
    "bamba": Architecture(
        "granitehybrid",
        {**_ATTENTION, **_FEED_FORWARD, **_MAMBA_BESIDE},
        _ROTARY,
    ),
    "granite": Architecture("granite", _DENSE, _ROTARY),
    "granitemoe": _granite_moe,
    "granitemoehybrid": _granite_hybrid,
    "granitemoeshared": _granite_moe,
    "llama": Architecture("llama", _DENSE, _ROTARY),
    "ministral3": Architecture("mistral3", _DENSE, _ROTARY),
    "mistral": Architecture("llama", _DENSE, _ROTARY),
    "mixtral": Architecture("llama", _ATTENTION, _ROTARY),
    "olmo": Architecture("olmo", _DENSE, _ROTARY),
    "smollm3": Architecture("smollm3", _DENSE, _ROTARY),
    # Fused queries, keys and values, taken apart by kind.
    "bloom": Architecture("bloom", _BLOOM, {"self_attention.query_key_value": _fused_heads}),
    "falcon": Architecture("falcon", _BLOOM, {"self_attention.query_key_value": _falcon}),
    "gpt_neox": Architecture(
        "gptneox",
        {key.replace("self_attention", "attention"): name for key, name in _BLOOM.items()},
        {"attention.query_key_value": _fused_heads},
    ),
    # Rows as they are.
    "afmoe": Architecture(
        "afmoe",
        {
            **_DENSE,
            "self_attn.gate_proj": "attn_gate",
            "mlp.router.gate": "ffn_gate_inp",
            **_shared("mlp.shared_experts"),
        },
    ),
    "apertus": Architecture("apertus", {**_ATTENTION, **_UP_DOWN}),
    "cohere": Architecture("command-r", _DENSE),
    "cohere2": Architecture("cohere2", _DENSE),
    "deepseek_v2": _latent_attention("deepseek2", head=False, shared=True),
    "deepseek_v3": _latent_attention("deepseek2", head=False, shared=True),
    "dots1": Architecture("dots1", {**_DENSE, **_shared("mlp.shared_experts")}),
    "ernie4_5": Architecture("ernie4_5", _DENSE),
    "ernie4_5_moe": Architecture("ernie4_5-moe", {**_DENSE, **_shared("mlp.shared_experts")}),
    "exaone4": Architecture("exaone4", _DENSE),
    "exaone_moe": Architecture("exaone-moe", {**_DENSE, **_shared("mlp.shared_experts")}),
    "falcon_mamba": Architecture("mamba", _MAMBA),
    "gemma": Architecture("gemma", _DENSE, head=False),
    "gemma2": Architecture("gemma2", _DENSE, head=False),
    "gemma3_text": Architecture("gemma3", _DENSE, head=False),
    "glm": Architecture("chatglm", _GATE_IN_UP),
    "glm4": _glm4,
    "glm4_moe": Architecture("glm4moe", {**_DENSE, **_shared("mlp.shared_experts")}),
    "gpt2": Architecture("gpt2", _GPT2),
    "gpt_bigcode": _gpt_bigcode,
    "gpt_oss": Architecture("gpt-oss", _ATTENTION),
    "hunyuan_v1_dense": Architecture("hunyuan-dense", _DENSE),
    "jais2": Architecture("jais2", {**_ATTENTION, **_UP_DOWN}),
    "lfm2": Architecture("lfm2", _LFM2),
    "lfm2_moe": Architecture("lfm2moe", _LFM2),
    "llama4_text": Architecture(
        "llama4",
        {
            **_ATTENTION,
            **_FEED_FORWARD,
            **_shared("feed_forward.shared_expert"),
        },
    ),
    "mamba": Architecture("mamba", _MAMBA),
    "mamba2": Architecture("mamba2", _MAMBA2),
    "minicpm3": _latent_attention("minicpm3", head=True),
    "mpt": Architecture(
        "mpt",
        {
            "attn.Wqkv": "attn_qkv",
            "attn.out_proj": "attn_output",
            "ffn.up_proj": "ffn_up",
            "ffn.down_proj": "ffn_down",
        },
    ),
    "nemotron": Architecture("nemotron", {**_ATTENTION, **_UP_DOWN}),
    "olmo2": Architecture("olmo2", _DENSE),
    "olmo3": Architecture("olmo2", _DENSE),
    "olmoe": Architecture("olmoe", _ATTENTION),
    "phi": Architecture(
        "phi2",
        {**_ATTENTION, "self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
    ),
    "phi3": Architecture(
        "phi3",
        {
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
    ),
    "phimoe": Architecture("phimoe", _ATTENTION),
    "qwen2": Architecture("qwen2", _DENSE),
    "qwen2_moe": Architecture(
        "qwen2moe",
        {**_ATTENTION, **_shared("mlp.shared_expert"), "mlp.shared_expert_gate": "ffn_gate_inp_shexp"},
    ),
    "qwen3": Architecture("qwen3", _DENSE),
    "qwen3_5_text": Architecture(
        "qwen35",
        {
            **_DENSE,
            "linear_attn.in_proj_qkv": "attn_qkv",
            "linear_attn.in_proj_z": "attn_gate",
            "linear_attn.in_proj_a": "ssm_alpha",
            "linear_attn.in_proj_b": "ssm_beta",
            "linear_attn.out_proj": "ssm_out",
        },
        rows={
            "linear_attn.in_proj_qkv": _queries_keys_values,
            "linear_attn.in_proj_z": _values,
            "linear_attn.in_proj_a": _value_gates,
            "linear_attn.in_proj_b": _value_gates,
        },
        columns={"linear_attn.out_proj": _values},
    ),
    "qwen3_moe": Architecture("qwen3moe", _ATTENTION),
    "qwen3_next": Architecture(
        "qwen3next",
        {
            **_ATTENTION,
            **_shared("mlp.shared_expert"),
            "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
            "linear_attn.in_proj_qkvz": ("attn_qkv", "attn_gate"),
            "linear_attn.in_proj_ba": "ssm_ba",
            "linear_attn.out_proj": "ssm_out",
        },
        rows={"linear_attn.in_proj_qkvz": _groups_of_four},
    ),
    "seed_oss": Architecture("seed_oss", _DENSE),
    "solar_open": Architecture("glm4moe", {**_DENSE, **_shared("mlp.shared_experts")}),
    "stablelm": Architecture("stablelm", _DENSE),
    "starcoder2": Architecture("starcoder2", {**_ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
    "youtu": _latent_attention("deepseek2", head=False),
    # Read, and not possible.
    "bitnet": "llama.cpp's converter rounds BitNet's weights to three values: the base in GGUF is another function",
}
"""`model_type` of transformers -> what llama.cpp makes of it, or why there is no adapter for it."""

EMBEDDINGS = ("embed_tokens", "embed_in", "embeddings", "word_embeddings", "wte")
HEADS = ("embed_out", "lm_head")


def architecture(settings: Settings) -> Architecture | str:
    """What llama.cpp makes of the architecture, or why a GGUF adapter for it cannot be written."""
    kind = settings.get("model_type")
    found = ARCHITECTURES.get(str(kind))
    if found is None:
        return (
            f"the order in which llama.cpp's converter writes the weights of {kind!r} is not known here. Export with "
            f"`--to merged` and convert the merged model. {nearest(str(kind), ARCHITECTURES)}"
        )
    return found(settings) if callable(found) else found


def why_not_gguf(settings: Settings, sites: Iterable[str]) -> str:
    """Why llama.cpp cannot apply a LoRA on these layers of this base, with the layer; empty where it can."""
    found = architecture(settings)
    if isinstance(found, str):
        return found
    for site in sites:
        if (where := _where(found, settings, site)) and isinstance(where, str):
            return f"{site}: {where}. Export with `--to merged` and convert the merged model, or leave the layer out"
    return ""


def gguf_factors(settings: Settings, site: str, A: Tensor, B: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """GGUF tensor of the base -> its factors: A [r, d_in] and the rows of B [d_out, r] that belong to it."""
    found = architecture(settings)
    assert isinstance(found, Architecture), found
    where = _where(found, settings, site)
    assert not isinstance(where, str), where
    module = _module(site)
    rows = found.rows[module](B, settings) if module in found.rows else (B,)
    if module in found.columns:
        (columns,) = found.columns[module](A.T, settings)
        A = columns.T
    return {tensor: (A, part) for tensor, part in zip(where, rows, strict=True)}


def _where(gguf: Architecture, settings: Settings, site: str) -> tuple[str, ...] | str:
    """The tensors of a site, or why there are none."""
    last, module = site.rpartition(".")[2], _module(site)
    tied = settings.get("tie_word_embeddings", True)
    if not module and last in HEADS:
        if tied:
            return "the head is tied to the embeddings, so the base in GGUF has no output.weight"
        return ("output.weight",) if gguf.head else f"llama.cpp takes no adapter on the head of {gguf.name}"
    if not module and last in EMBEDDINGS:
        if tied:
            return "the embeddings are tied to the head, and llama.cpp would apply the delta there too"
        return ("token_embd.weight",)
    if module in gguf.without_adapters:
        return f"llama.cpp multiplies by this layer of {gguf.name} without adapters, so the delta would have no effect"
    if module not in gguf.layers:
        return f"llama.cpp has no layer of {gguf.name} for it that takes adapters"
    number = _NUMBER.search(site)
    assert number is not None
    names = gguf.layers[module]
    return tuple(f"blk.{number[1]}.{name}.weight" for name in ((names,) if isinstance(names, str) else names))


_NUMBER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def _module(site: str) -> str:
    """The name of a module inside its decoder layer; empty for one outside of them."""
    number = _NUMBER.search(site)
    return site[number.end() :] if number else ""
