"""Tiny models of many types: what a type needs beside the sizes of `graftlm.testing.tiny_model`."""

from typing import Any

import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM

from graftlm.testing import TINY, tiny_model

EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SIZES: dict[str, dict[str, Any]] = {
    "afmoe": EXPERTS | {"num_experts": 4, "num_dense_layers": 1},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere2_moe": EXPERTS | {"num_experts": 4, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v2": ROUTED | LATENT | {"first_k_dense_replace": 1},
    "deepseek_v3": ROUTED | LATENT | {"first_k_dense_replace": 1},
    "dots1": ROUTED | {"first_k_dense_replace": 1},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2},
    "exaone_moe": EXPERTS | {"num_experts": 4, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "altup_num_inputs": 2,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "glm4_moe": ROUTED | {"first_k_dense_replace": 1},
    "glm4_moe_lite": ROUTED | LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"rotary_dim": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": EXPERTS | {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "llama4_text": {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 24},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "mellum": EXPERTS | {"num_experts": 4},
    "mimo_v2_flash": EXPERTS | {"n_routed_experts": 4},
    "minicpm3": LATENT,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 16,
    },
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_5_moe_text": LINEAR | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR,
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "qwen3_next": LINEAR | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "solar_open": ROUTED,
    "youtu": LATENT,
}


def base(kind: str, **changes: Any) -> Any:
    """A random model of a type, two layers, float32, in evaluation mode."""
    if kind == "falcon":  # its config has no place for a head_dim
        return falcon(num_kv_heads=4, **changes)
    return tiny_model(kind, **(SIZES.get(kind, {}) | changes))


def falcon(**changes: Any) -> Any:
    """Falcon with plain linear layers: its own class differs from nn.Linear by how it adds the bias alone."""
    sizes = {key: value for key, value in TINY.items() if key not in ("head_dim", "num_key_value_heads")}
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(**(sizes | changes))).eval()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.load_state_dict(layer.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    return model.requires_grad_(False)
