"""A tiny model of every class of causal language models in transformers, and what is asked of each.

`benchmarks/architectures` fills the whole matrix; `tests/model/test_architectures.py` a sample of its rows.
"""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from graftlm.adapters.export.export import export
from graftlm.adapters.export.merged import merge_into
from graftlm.adapters.load import load_adapter
from graftlm.adapters.peft import why_not_peft
from graftlm.adapters.save import save_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.errors import GraftError
from graftlm.model.attach import attach
from graftlm.model.modes import deltas_off
from graftlm.model.registry import hosts, trainable
from graftlm.model.sites import output_head
from graftlm.model.state_dict import merged_state
from graftlm.passes.forward import head, hidden_states
from graftlm.passes.packed_attention import packed_attention
from graftlm.passes.packing_check import check_forward, check_packed_rows
from graftlm.testing.deltas import move
from graftlm.testing.tiny import TINY, tiny_of

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "top_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
OLDER_NAMES = {
    "d_model": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_layers": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_layers": 2,
    "num_heads": 4,
    "n_inner": 48,
    "ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
}
STATES = {
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
GENERIC = EXPERTS | LATENT | OLDER_NAMES | STATES

BOTH_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
SIX_HEADS = {"linear_num_value_heads": 6}
"""Three for each head of keys: a wrong order of heads shows, where with two its inverse is the same."""

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "ctrl": {"dff": 48},
    "cpmant": {"dim_ff": 48},
    "dbrx": {
        "tie_word_embeddings": False,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"o_lora_rank": 8, "o_groups": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": BOTH_KINDS | {"shared_intermediate_size": 24},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "inkling2_loop_text": {"unpadded_vocab_size": 300},
    "inkling2_text": {"unpadded_vocab_size": 300},
    "kimi_linear": {"num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 24},
    "mamba2": {"n_heads": 4, "num_heads": 4, "head_dim": 16},
    "minimax_m3_vl_text": {"shared_intermediate_size": 24, "dense_intermediate_size": 48},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 24},
    "prophetnet": {"num_encoder_layers": 1, "num_decoder_layers": 2, "num_encoder_attention_heads": 4},
    "qwen3_5_moe_text": BOTH_KINDS | SIX_HEADS,
    "qwen3_5_text": BOTH_KINDS | SIX_HEADS,
    "qwen3_next": BOTH_KINDS | SIX_HEADS,
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
} | dict.fromkeys(
    (
        *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
        *("longcat_flash", "minicpm3", "sarvam_mla", "youtu"),
    ),
    {"num_key_value_heads": 4},  # latent attention has as many heads of keys as of queries
)
"""What a class wants otherwise."""

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "falcon": ("head_dim",),
    "prophetnet": ("num_hidden_layers", "num_layers"),
    "xlnet": ("max_position_embeddings",),
    "xlstm": ("v_head_dim", "qk_head_dim"),
}
"""Settings above that a class refuses."""

NOT_BUILT = {
    **dict.fromkeys(
        (
            *("emu3", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4", "mllama"),
            *("moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe"),
            *("qwen4_exp", "dots3_note", "gemma4_assistant", "gemma4_unified_assistant"),
        ),
        "its config is one of several models; where there is a class for text alone, that one is here",
    ),
    "blt": "its sizes are those of models inside it, of bytes and patches",
    "prophetnet": "it predicts several tokens at once, by a stream of hidden states for each",
    "xmod": "its forward pass asks for a language",
}
"""Types without a tiny model, and why."""

NAMES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_BUILT.keys())


def settings(name: str) -> dict[str, Any]:
    """What the config of a class is made with."""
    found = TINY | GENERIC | SPECIAL.get(name, {})
    return {key: value for key, value in found.items() if key not in LEFT_OUT.get(name, ())}


def build(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """The tiny model of a class, by its model type: random, float32, in evaluation mode."""
    return tiny_of(AutoConfig.for_model(name, **(settings(name) | changes)), seed=seed)


# What is asked ------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A number that is not what it should be."""


class DoesNotApply(Exception):
    """A question that this class has no answer to, for a reason that is not ours."""


def ids(length: int, seed: int) -> Tensor:
    return torch.randint(3, 299, (length,), generator=torch.Generator().manual_seed(seed))


PAIRS = ((ids(9, 1), ids(12, 2)), (ids(14, 3), ids(33, 4)), (ids(30, 5), ids(10, 6)))
"""Pairs of rows for the proof: a few tokens, more than the proof looks at, the short one second."""


def logits(model: Any, row: Tensor = PAIRS[0][1]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=row[None], use_cache=False).logits[0].float()
    return found


def same(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-4) -> None:
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= tolerance:
        raise Wrong(f"{what} differ by {difference:.2g} of the largest")


def with_lora(name: str) -> Any:
    """The tiny model of a class with LoRA on every linear layer, away from its start."""
    model = build(name)
    attach(model, LoraConfig(r=4, alpha=8))
    return move(model)


def sites(name: str) -> str:
    """How many layers `all-linear` means, and the share of the matrices (embeddings and head aside) that they are."""
    model = build(name)
    head, skipped = output_head(model), set[int]()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is head:
            skipped |= {id(p) for p in module.parameters()}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in skipped)
    attach(model, LoraConfig(r=4, alpha=8))
    found = hosts(model)
    return f"{len(found)} ({sum(h.view.stored_weight.numel() for h in found.values()) / matrices:.0%})"


def off_is_the_base(name: str) -> None:
    wanted, model = logits(build(name)), with_lora(name)
    with deltas_off(model):
        if not torch.equal(logits(model), wanted):
            raise Wrong("logits with deltas off are not the base's bits")
    if torch.equal(logits(model), wanted):
        raise Wrong("the deltas change nothing")


def merged_is_the_model(name: str) -> None:
    model, plain = with_lora(name), build(name)
    plain.load_state_dict(merged_state(model), strict=False, assign=True)  # weights that were tied may differ now
    same(logits(plain), logits(model), "merged weights and forward pass")


def _weighted(found: Tensor) -> Tensor:
    return (found * torch.linspace(0.5, 2, len(found))).sum()


def gradients(name: str) -> str:
    """One step on two rows, packed where the proof allows it, against the model's own forward pass row by row."""
    model, rows = with_lora(name), PAIRS[0]
    check_forward(model, rows[1])
    for row in rows:
        own = model(input_ids=row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        if not own.requires_grad:
            raise DoesNotApply("transformers: its layers need a gradient of their own weights")
        _weighted(own.gather(1, row[1:, None])[:, 0]).backward()
    wanted = {key: p.grad for key, p in trainable(model).items()}
    model.zero_grad()
    try:
        check_packed_rows(model, *rows)
        packs, how = [_pack(rows)], "packed"
    except GraftError:
        packs, how = [_pack([row]) for row in rows], "row by row"
    with packed_attention(model) if how == "packed" else nullcontext():
        for pack in packs:
            found = head(model, hidden_states(model, pack)[pack.hidden_rows], pack.targets)
            sum(_weighted(part) for part in found.split([n - 1 for n in pack.lengths])).backward()
    largest = max(float(g.abs().max()) for g in wanted.values() if g is not None)
    dead = sum(g is None for g in wanted.values())
    for key, p in trainable(model).items():
        if (p.grad is None) != (wanted[key] is None):
            raise Wrong(f"{key} has a gradient in one of the two passes only")
        if p.grad is not None and not float((p.grad - wanted[key]).abs().max()) <= 1e-3 * largest:
            raise Wrong(f"the gradient of {key} differs by {float((p.grad - wanted[key]).abs().max()) / largest:.2g}")
    return how + (f", {dead} tensors without a gradient" if dead else "")


class _pack:
    """Rows as `hidden_states` takes them."""

    def __init__(self, rows: Any) -> None:
        self.lengths, self.parents = [len(row) for row in rows], [-1] * len(rows)
        self.ids = torch.cat(list(rows))[None]
        self.positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        places = torch.arange(self.ids.numel()).split(self.lengths)
        self.hidden_rows = torch.cat([place[:-1] for place in places])
        self.targets = torch.cat([row[1:] for row in rows])


def proof(name: str) -> str:
    """The proof on three pairs of rows in float32 and bfloat16, shared beginnings included, against what is so.

    What is so, in float32: whether a row in a pack has the log-probabilities of the row alone.
    """
    dtypes_by_error: dict[str, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build(name, initializer_range=0.1).to(dtype)
        for first, second in PAIRS:
            try:
                check_forward(model, second)
                check_packed_rows(model, first, second, sharing=True)
            except GraftError as error:
                dtypes_by_error.setdefault(str(error), []).append(str(dtype))
            else:
                dtypes_by_error.setdefault("", []).append(str(dtype))
    if len(dtypes_by_error) > 1 and "" in dtypes_by_error:
        raise Wrong(
            f"refused for {sum(len(d) for e, d in dtypes_by_error.items() if e)} of 6 pairs: {max(dtypes_by_error)}"
        )
    if "" in dtypes_by_error:
        return "proved"
    reason = next(iter(dtypes_by_error))
    if _is_right_in_a_pack(name):
        raise Wrong(f"false alarm: {reason}")
    raise GraftError(reason, code="architecture-refused")


def _is_right_in_a_pack(name: str) -> bool:
    model = build(name, initializer_range=0.1)
    first, second = PAIRS[1]
    pack = _pack([first, second, first])
    at = slice(len(first), len(first) + len(second) - 1)
    try:
        own = logits(model, second)[:-1].log_softmax(-1).gather(1, second[1:, None])[:, 0]
        with packed_attention(model), torch.no_grad():
            found = head(model, hidden_states(model, pack)[at], second[1:])
    except Exception:
        return False
    return float((found - own).abs().max()) <= 1e-4


def save_and_load(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, other = with_lora(name), build(name)
        save_adapter(model, f"{folder}/a")
        load_adapter(other, f"{folder}/a")
        if not torch.equal(logits(other), logits(model)):
            raise Wrong("a loaded adapter does not compute the same bits")


def peft_reads_ours(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = with_lora(name)
        if reason := why_not_peft(model):
            raise GraftError(reason, code="architecture-refused")
        save_adapter(model, f"{folder}/a")
        theirs = peft.PeftModel.from_pretrained(build(name), f"{folder}/a")
        same(logits(theirs.base_model.model), logits(model), "logits of PEFT and ours", 1e-3)


def reads_that_of_peft(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
            theirs = peft.get_peft_model(build(name), config)
        except Exception as error:
            raise DoesNotApply(f"PEFT: {type(error).__name__}: {error}") from error
        move(theirs, seed=3).eval().save_pretrained(folder)
        model = build(name)
        load_adapter(model, folder)
        same(logits(model), logits(theirs.base_model.model), "logits of ours and PEFT", 1e-3)


def merged_folder(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = with_lora(name)
        merge_into(model, f"{folder}/m")
        same(logits(_loaded(f"{folder}/m")), logits(model), "logits of the merged folder and the model")


def _loaded(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def generates_as_merged(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, prompt = with_lora(name), PAIRS[0][0][None]
        merge_into(model, f"{folder}/m")
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 299}
        try:
            build(name).generate(prompt, **options)
        except Exception as error:
            raise DoesNotApply(f"transformers: {type(error).__name__}: {error}") from error
        if not torch.equal(model.generate(prompt, **options), _loaded(f"{folder}/m").generate(prompt, **options)):
            raise Wrong("greedy answers of the model and of its merged folder differ")


def to_gguf(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        export(with_lora(name), f"{folder}/g", to="gguf")


COLUMNS: dict[str, Callable[[str], str | None]] = {
    "LoRA sites": sites,
    "deltas off = base": off_is_the_base,
    "merge = forward": merged_is_the_model,
    "gradients = own": gradients,
    "packing": proof,
    "save, load": save_and_load,
    "PEFT reads ours": peft_reads_ours,
    "reads PEFT's": reads_that_of_peft,
    "merged folder": merged_folder,
    "generates as merged": generates_as_merged,
    "GGUF": to_gguf,
}


def answer(column: str, name: str) -> dict[str, str]:
    """One cell: `verdict` is ok, refused, wrong, crash or no (it does not apply), with the reason."""
    try:
        return {"verdict": "ok", "says": COLUMNS[column](name) or ""}
    except GraftError as error:
        return {"verdict": "refused", "says": str(error)}
    except Wrong as error:
        return {"verdict": "wrong", "says": str(error)}
    except DoesNotApply as error:
        return {"verdict": "no", "says": str(error)}
    except Exception as error:
        return {"verdict": "crash", "says": f"{type(error).__name__}: {error}"}
