"""Reported mistakes where a delta meets a model: which layers it sits on, what model code does with them, and rows."""

import copy
import io
import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from graftlm import DataConfig, LoraConfig, Recipe, TrainConfig, train
from graftlm.combine.merge import merge
from graftlm.deltas import METHODS
from graftlm.hub.load import load_base
from graftlm.hub.quantize_base import quantize
from graftlm.kernels import cpu, linear
from graftlm.model.attach import attach, detach
from graftlm.model.coverage import coverage
from graftlm.model.modes import activate, by_row, deltas_off
from graftlm.model.quantize import QuantizedLinear
from graftlm.model.registry import hosts, trainable
from graftlm.model.sites import find_sites, towers
from graftlm.model.state_dict import merged_state
from graftlm.testing import save_tiny_base, tiny_model, tiny_tokenizer
from graftlm.testing.deltas import close, ids, logits, move, tiny_config
from tests.errors import raises

SMALL = LoraConfig(r=2, alpha=4)

MORE: dict[str, dict[str, Any]] = {
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "attn_temperature_tuning": False},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmo": {"clip_qkv": 0.5},
    "olmoe": {"clip_qkv": 0.5, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "rwkv": {"attention_hidden_size": 32},
}


def made(kind: str, **more: Any) -> Any:
    return tiny_model(kind, **(MORE.get(kind, {}) | more))


def opt() -> Any:
    """OPT, whose config knows no size of a head."""
    torch.manual_seed(0)
    sizes = {"ffn_dim": 48, "max_position_embeddings": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    config = AutoConfig.for_model("opt", vocab_size=300, hidden_size=32, num_hidden_layers=2, **sizes)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def falcon() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "falcon", vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def gemma3() -> Any:
    """A model that also sees, with a tower of one layer."""
    torch.manual_seed(0)
    text = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    vision = {"num_attention_heads": 4, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    config = Gemma3Config(
        text_config={"vocab_size": 300, **sizes, **text}, vision_config=sizes | vision, mm_tokens_per_image=4
    )
    return Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)


# Saving ----------------------------------------------------------------------------------------------------------


def test_save_pretrained_of_a_model_with_deltas_is_refused_and_the_base_is_saved_again_without(tmp_path: Path) -> None:
    model = tiny_model()
    base = logits(model)
    attach(model, SMALL, name="one")
    attach(model, SMALL, name="two")
    detach(model, "one")
    for part in (model, model.model):
        with raises("target/deltas-on-model"), deltas_off(model):
            part.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    detach(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), base)


# Quantization --------------------------------------------------------------------------------------------------------


def test_quantizing_a_model_with_fused_experts_says_what_share_is_quantized(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = made("mixtral")
    with caplog.at_level(logging.WARNING):
        quantize(model, "nf4")
    linear = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    left = {n: p.numel() for n, p in model.named_parameters() if "experts" in n or n.endswith("gate.weight")}
    (message,) = caplog.messages
    assert f"nf4: {linear / (linear + sum(left.values())):.0%} of the decoder's weights are quantized" in message
    assert "model.layers.*.mlp.experts.gate_up_proj" in message
    caplog.clear()
    quantize(tiny_model(), "nf4")
    assert not caplog.messages


def test_the_share_under_deltas_names_the_experts_that_none_reaches() -> None:
    model = attach(made("mixtral"), SMALL)
    found = coverage(model)
    under = sum(h.view.d_in * h.view.d_out for h in hosts(model).values())  # type: ignore[union-attr]
    experts = {n: p.numel() for n, p in model.named_parameters() if ".experts." in n}
    assert found.under_deltas == under
    assert sum(found.experts.values()) == sum(experts.values())
    assert set(found.experts) == {f"model.layers.*.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert found.weights == under + sum(experts.values()) + sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")
    )
    assert any("no delta reaches the experts" in line and "down_proj (" in line for line in found.lines())


def test_a_dense_model_is_covered_whole_and_half_of_it_by_half() -> None:
    assert coverage(attach(tiny_model(), SMALL)).lines() == ["deltas sit on 100% of the decoder's weights"]
    found = coverage(attach(tiny_model(), SMALL, targets=r".*\.0\..*"))
    assert found.under_deltas * 2 == found.weights


# Layers whose weight model code reads -----------------------------------------------------------------------------


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return T5ForConditionalGeneration(config).eval().requires_grad_(False)


@torch.no_grad()
def t5_logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=ids(), decoder_input_ids=ids(seed=1, length=5)).logits
    return out


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba", "hunyuan_v1_moe", "rwkv", "t5"])
def test_hosts_answer_weight_and_bias_so_that_models_that_read_them_run_and_merge(kind: str) -> None:
    build, run = (t5, t5_logits) if kind == "t5" else (lambda: made(kind), logits)
    base = run(build())
    model = build()
    attach(model, SMALL)
    with deltas_off(model):
        assert torch.equal(run(model), base)
    move(model)
    assert not torch.equal(run(model), base)
    plain = build()
    plain.load_state_dict(merged_state(model))
    if kind == "rwkv":  # which halves weights in place at its first pass, and doubles them again when it trains
        plain.rwkv.layers_are_rescaled = True
    close(run(plain), run(model), kind)


def test_a_host_answers_what_model_code_asks_of_its_layer() -> None:
    model = tiny_model(attention_bias=True)
    model.model.embed_tokens.padding_idx = 0
    layers = {name: model.get_submodule(name) for name in ("model.layers.0.self_attn.k_proj", "model.embed_tokens")}
    attach(model, SMALL, targets=("k_proj", "embed_tokens"))
    questions_by_layer = (
        ("weight", "bias", "in_features", "out_features"),
        ("weight", "num_embeddings", "embedding_dim", "padding_idx"),
    )
    for (name, layer), questions in zip(layers.items(), questions_by_layer, strict=True):
        host = model.get_submodule(name)
        assert host is not layer
        assert all(getattr(host, question) is getattr(layer, question) for question in questions)
        assert not hasattr(host, "no_such_thing")
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba"])
def test_a_layer_whose_weight_is_used_without_a_call_is_left_out_or_refused(kind: str) -> None:
    model = made(kind)
    attach(model, SMALL)
    assert not any(name.endswith("dt_proj") for name in hosts(model))
    assert any(name.endswith(("in_proj", "x_proj")) for name in hosts(model))
    assert any("dt_proj" in line and "does not call" in line for line in coverage(model).lines())
    detach(model)
    modules = dict(model.named_modules())
    for targets in (("x_proj", "dt_proj"), r".*\.dt_proj"):
        with raises("target/layers-never-called", match=r"dt_proj, .*: \w+ForCausalLM"):
            attach(model, SMALL, targets=targets)
    assert all(modules[name] is module for name, module in model.named_modules()), "the model is as it was"


def test_a_weight_that_is_used_under_another_name_is_found() -> None:
    class Block(nn.Module):
        """A feed-forward block that never calls `down_proj`."""

        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.up_proj, self.down_proj = mlp.up_proj, mlp.down_proj

        def forward(self, x: Tensor) -> Tensor:
            layer = self.down_proj
            return torch.relu(self.up_proj(x)) @ layer.weight.T

    model = tiny_model()
    model.model.layers[1].mlp = Block(model.model.layers[1].mlp)
    attach(model, SMALL)
    assert "model.layers.1.mlp.up_proj" in hosts(model)
    assert "model.layers.1.mlp.down_proj" not in hosts(model)


def test_what_reads_a_dtype_or_scales_in_place_is_no_use_of_a_weight() -> None:
    """T5 reads the dtype of `wo`, RWKV halves the weight of `output`: both call the layer."""
    assert any(name.endswith(".wo") for name in hosts(attach(t5(), SMALL)))
    assert any(name.endswith("attention.output") for name in hosts(attach(made("rwkv", rescale_every=1), SMALL)))


def test_quantized_layers_answer_weight_too() -> None:
    model = quantize(made("mamba"), "nf4")
    base = logits(model)
    attach(model, SMALL)
    with deltas_off(model):
        assert torch.equal(logits(model), base)


def test_layers_that_torch_reads_by_itself_are_no_sites() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    assert find_sites(Block(), "all-linear") == ["out"]
    with raises("target/layer-of-other-kind", match="out_proj"):
        find_sites(Block(), ("out_proj",))


# Models that edit outputs in place --------------------------------------------------------------------------------


def gradients_of_peft(model: Any, factors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients of the factors (A, B) of each site in PEFT's LoRA of the same model, where the scale is 2."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(factors), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    layers = {name: theirs.get_submodule(f"base_model.model.{name}") for name in factors}
    for name, (A, B) in factors.items():
        layers[name].lora_A["default"].weight.data.copy_(A)
        layers[name].lora_B["default"].weight.data.copy_(B)
    theirs(input_ids=ids(), labels=ids()).loss.backward()
    pairs = {
        n: (layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad) for n, layer in layers.items()
    }
    return {name: (A, B) for name, (A, B) in pairs.items() if A is not None and B is not None}


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("kind", ["olmo", "olmoe", "llama4_text"])
def test_outputs_that_a_model_edits_in_place_have_the_gradients_of_peft(kind: str, quantization: str | None) -> None:
    model, plain = made(kind), made(kind)
    if quantization:
        plain.load_state_dict(merged_state(quantize(model, quantization)))
    move(attach(model, SMALL))
    model(input_ids=ids(), labels=ids()).loss.backward()
    deltas: dict[str, Any] = {name: host.deltas["default"] for name, host in hosts(model).items()}
    wanted = gradients_of_peft(plain, {name: (d.A.detach(), d.B.detach()) for name, d in deltas.items()})
    assert wanted.keys() == deltas.keys()
    for name, (A, B) in wanted.items():
        close(deltas[name].A.grad, A, f"{name}: A", 1e-4)
        close(deltas[name].B.grad, B, f"{name}: B", 1e-4)


def test_no_operation_of_ours_returns_a_view_that_it_made_itself() -> None:
    """autograd refuses to edit such a view in place, and model code does edit what layers return."""
    x, W = torch.randn(2, 5, 16), torch.randn(16, 16)
    A, B, gain = torch.randn(4, 16).requires_grad_(), torch.randn(16, 4).requires_grad_(), torch.ones(16)
    outputs = {
        "low rank": lambda x: linear.low_rank_linear(x, W, torch.randn(16), A, B),
        "low rank with a gain": lambda x: linear.low_rank_linear(x, W, torch.randn(16), A, B, gain),
        "frozen": lambda x: linear.frozen_linear(x, W, torch.randn(16)),
        "gate": lambda x: linear.silu_gate(x, x),
        "norm": lambda x: linear.rms_norm(x, gain, 1e-6),
    }
    if not cpu.unavailable(torch.device("cpu"), torch.bfloat16):
        half, cos = W.bfloat16(), torch.ones(1, 5, 32, dtype=torch.bfloat16)
        outputs |= {
            "our low rank": lambda x: cpu.low_rank_linear(x.bfloat16(), half, None, A, B),
            "our gate": lambda x: cpu.silu_gate(x.bfloat16(), x.bfloat16()),
            "our norm": lambda x: cpu.rms_norm(x.bfloat16(), gain.bfloat16(), 1e-6),
            "our rotary": lambda x: cpu.rotary(*(x.bfloat16().view(1, 2, 5, -1).repeat(1, 1, 1, 2),) * 2, cos, cos)[0],
        }
    for what, function in outputs.items():
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (2 * y).sum().backward()
        wanted, leaf.grad = leaf.grad, None
        y = function(leaf)
        y.mul_(2)
        y.sum().backward()
        assert leaf.grad is not None, what
        close(leaf.grad, wanted, what)


# What is a linear layer -------------------------------------------------------------------------------------------


def test_subclasses_that_compute_a_linear_layer_are_sites_as_in_peft() -> None:
    model = falcon()
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    adapted = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert find_sites(model, "all-linear") == [name.removeprefix("base_model.model.") for name in adapted]
    base = logits(model)
    move(attach(model, SMALL))
    plain = falcon()
    plain.load_state_dict(merged_state(model))
    close(logits(plain), logits(model), "merged")
    assert not torch.equal(logits(model), base)
    assert any(isinstance(m, QuantizedLinear) for m in quantize(falcon(), "int8").modules())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_only_what_a_layer_computes_makes_it_a_site() -> None:
    class Same(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + (0 if self.bias is None else self.bias)

    class WithScale(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    layers = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 6),
            "same": Same(4, 6),
            "in_bf16": Same(4, 6, bias=False).bfloat16(),
            "scaled": WithScale(4, 6),
            "pair": Pair(4, 6),
            "nothing_in": nn.Linear(0, 6),
            "nothing_out": nn.Linear(4, 0),
        }
    )
    assert find_sites(layers, "all-linear") == ["plain", "same", "in_bf16"]
    forward = layers["plain"].forward
    layers["plain"].forward = lambda x: 2 * forward(x)  # type: ignore[assignment]
    assert find_sites(layers, "all-linear") == ["same", "in_bf16"]
    layers["plain"].forward = lambda x: forward(x)  # type: ignore[assignment]
    assert find_sites(layers, "all-linear") == ["plain", "same", "in_bf16"]


def test_a_forward_that_somebody_set_on_a_block_is_still_there_after_attach_and_detach() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counting(ModelHook):  # type: ignore[misc]
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model = tiny_model()
    base, block, layer = logits(model), model.model.layers[0].mlp, model.model.layers[1].self_attn.q_proj
    hook, other = Counting(), Counting()
    add_hook_to_module(block, hook)
    add_hook_to_module(layer, other)
    forward = block.forward
    attach(model, SMALL)
    assert "model.layers.1.self_attn.q_proj" in hosts(model)
    with deltas_off(model):
        before = hook.calls
        assert torch.equal(logits(model), base)
        assert hook.calls == before + 1
    attach(model, tiny_config("parallel"), name="block")
    detach(model)
    assert block.forward is forward
    assert model.model.layers[1].self_attn.q_proj is layer
    before = hook.calls, other.calls
    assert torch.equal(logits(model), base)
    assert (hook.calls, other.calls) == (before[0] + 1, before[1] + 1)


# Models that also see ---------------------------------------------------------------------------------------------


def test_keywords_mean_the_decoder_of_a_model_that_also_sees() -> None:
    model = gemma3()
    inside = "model.language_model."
    for targets in ("all-linear", "all-norms", "all", "all-mlp"):
        kinds = ("linear", "norm", "embedding", "sublayer")
        found = find_sites(model, targets, kinds)
        assert found, targets
        assert all(name.startswith(inside) for name in found), targets
    assert find_sites(model, r"model\.vision_tower\..*q_proj"), "what is named is meant"
    assert towers(model) == ["model.vision_tower", "model.multi_modal_projector"]
    assert any("model.vision_tower" in line for line in coverage(attach(model, SMALL)).lines())
    assert towers(tiny_model()) == [] == towers(t5())


def test_default_targets_train_a_model_that_also_sees_on_text(tmp_path: Path) -> None:
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    gemma3().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    rows.write_text("".join(json.dumps({"prompt": f"Bin {n}?", "completion": "Blue."}) + "\n" for n in range(4)))
    settings = TrainConfig(steps=1, batch_rows=2)
    shown = io.StringIO()
    recipe = Recipe(base=str(base), data=DataConfig(train=str(rows)), delta=SMALL, train=settings)
    done = train(recipe, tmp_path / "out", console=Console(file=shown, width=200))
    assert "deltas sit on 100% of the decoder's weights" in shown.getvalue()
    assert "text does not reach it: model.vision_tower, model.multi_modal_projector" in shown.getvalue()
    moved = [p for name, p in trainable(done.model).items() if name.endswith(".B")]  # type: ignore[arg-type]
    assert moved
    assert all(bool(p.any()) for p in moved)


# Rows with deltas of their own ------------------------------------------------------------------------------------


def two(model: Any) -> Any:
    """With deltas `a` and `b`, both away from their start."""
    attach(model, SMALL, name="a")
    attach(model, LoraConfig(r=3, alpha=5), name="b", seed=3)
    return move(model)


@torch.no_grad()
def alone(model: Any, row: Tensor, *names: str) -> Tensor:
    activate(model, *names)
    out: Tensor = model(row[None]).logits
    return out


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2_moe", "mixtral"])
def test_rows_keep_their_deltas_where_a_model_lays_the_batch_out_flat(kind: str) -> None:
    model = two(opt() if kind == "opt" else made(kind))
    batch, rows = ids(rows=3), [("a",), (), ("b", "a")]
    with by_row(model, rows), torch.no_grad():
        together = model(batch).logits
    for number, names in enumerate(rows):
        close(together[number : number + 1], alone(model, batch[number], *names), f"row {number}")


def test_rows_keep_their_deltas_on_positions_that_the_model_looks_up_once_for_all() -> None:
    model = made("gpt2")
    for name in ("a", "b"):
        attach(model, SMALL, targets=("wpe", "wte"), name=name, seed=ord(name))
    move(model)
    batch, rows = ids(rows=3), [("a",), (), ("b", "a")]
    with by_row(model, rows), torch.no_grad():
        together = model(batch).logits
    for number, names in enumerate(rows):
        close(together[number : number + 1], alone(model, batch[number], *names), f"row {number}")


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2_moe"])
@pytest.mark.parametrize("several", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3}])
def test_the_beams_and_answers_of_a_row_have_its_deltas(kind: str, several: dict[str, int]) -> None:
    model = two(opt() if kind == "opt" else made(kind))
    batch, rows = ids(rows=2), [("a",), ("b",)]
    settings = several | {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with by_row(model, rows):
        found = model.generate(batch, **settings)
    wanted = []
    for number, names in enumerate(rows):
        activate(model, *names)
        wanted.append(model.generate(batch[number : number + 1], **settings))
    assert found.tolist() == torch.cat(wanted).tolist()
    assert wanted[0].tolist() != wanted[1].tolist()


@pytest.mark.parametrize("method", ["lora", "dora", "fourierft", "boft", "ia3", "loha"])
def test_a_row_with_a_weight_for_a_delta_is_the_model_with_that_weight_merged_in(method: str) -> None:
    assert METHODS[method].mergeable
    model = attach(tiny_model(), tiny_config(method), name="a")
    move(model)
    batch = ids(rows=3)
    with by_row(model, [{"a": 0.3}, {"a": -1.5}, {"a": 0.0}]), torch.no_grad():
        together = model(batch).logits
    for number, weight in enumerate((0.3, -1.5, 0.0)):
        plain = tiny_model()
        plain.load_state_dict(dict(merge(model, {"a": weight})), strict=False)
        with torch.no_grad():
            close(together[number : number + 1], plain(batch[number : number + 1]).logits, f"weight {weight}", 1e-4)


def test_weights_of_several_deltas_add_in_flat_batches_and_beams_too() -> None:
    model, rows = two(opt()), [{"a": 0.7, "b": 0.3}, {"b": 2.0}]
    batch, settings = ids(rows=2), {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    with by_row(model, rows), torch.no_grad():
        together, answers = model(batch).logits, model.generate(batch, **settings)
    for number, weights in enumerate(rows):
        plain = opt()
        plain.load_state_dict(dict(merge(model, weights)))
        with torch.no_grad():
            close(together[number : number + 1], plain(batch[number : number + 1]).logits, f"row {number}")
        assert answers[number : number + 1].tolist() == plain.generate(batch[number : number + 1], **settings).tolist()


def test_an_encoder_and_its_decoder_have_the_deltas_of_a_row_with_beams_again_and_again() -> None:
    model, rows = two(t5()), [("a",), ("b",)]
    batch, settings = ids(rows=2), {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    settings |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    with by_row(model, rows), torch.no_grad():
        together = model(input_ids=batch, decoder_input_ids=ids(seed=1, length=5)).logits
        answers = [model.generate(batch, **settings).tolist() for _ in range(2)]
        one_more = model(input_ids=batch, decoder_input_ids=ids(seed=1, length=5)).logits
    assert torch.equal(one_more, together)
    assert answers[0] == answers[1]
    for number, names in enumerate(rows):
        activate(model, *names)
        mine, theirs = batch[number : number + 1], ids(seed=1, length=5)[number : number + 1]
        with torch.no_grad():
            wanted = model(input_ids=mine, decoder_input_ids=theirs).logits
        close(together[number : number + 1], wanted, f"row {number}")
        (answer,) = model.generate(mine, **settings).tolist()
        assert answers[0][number][: len(answer)] == answer


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    model = two(tiny_model())
    with by_row(model, [("a",), ("b",)]):
        wanted = model(ids(rows=2)).logits
        with pytest.raises((TypeError, ValueError)):
            model(ids(rows=2), position_ids="none")
        with raises("target/row-count-mismatch"):
            model(ids(rows=3))
        assert torch.equal(model(ids(rows=2, length=5)).logits, model(ids(rows=2, length=5)).logits)
        assert torch.equal(model(ids(rows=2)).logits, wanted)


def test_a_prompt_before_some_rows_is_before_all_beams_of_them() -> None:
    model = attach(tiny_model(), tiny_config("prompt"), name="a")
    move(model, scale=1.0)
    batch = ids(rows=2)
    settings = {"max_new_tokens": 3, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with by_row(model, [("a",), ()]):
        found = model.generate(batch, **settings)
        with raises("target/invalid-weight"), by_row(model, [{"a": 0.5}]):
            pass
    wanted = []
    for number, names in enumerate([("a",), ()]):
        activate(model, *names)
        wanted.append(model.generate(batch[number : number + 1], **settings))
    assert found.tolist() == torch.cat(wanted).tolist()


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    model = two(tiny_model())
    with by_row(model, [("a",), ("b",)]), raises("target/row-count-mismatch", match="2 rows, the batch has 3"):
        model(ids(rows=3))

    class Choosing(nn.Module):
        """What a router makes of a batch: some of its tokens, in an order of its own."""

        def __init__(self, inner: nn.Module, count: int) -> None:
            super().__init__()
            self.inner, self.count = inner, count

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            return torch.cat([self.inner(flat[: self.count]), flat[self.count :]]).view(x.shape)

    for count in (6, 8, 23):
        model = two(tiny_model())
        model.model.layers[0].mlp = Choosing(model.model.layers[0].mlp, count)
        with by_row(model, [("a",), ("b",)]), raises("target/rows-not-separable"):
            model(ids(rows=2))
        with by_row(model, [("a",), ("a",)]):
            model(ids(rows=2))  # whatever it chose has the same deltas


def test_experts_that_are_layers_of_their_own_take_the_same_deltas_for_all_rows() -> None:
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    two(model)
    with raises("target/rows-not-separable", match=r"experts\.0: "), by_row(model, [("a",), ("b",)]):
        pass


# Models on which a delta would be wrong ---------------------------------------------------------------------------


def test_weights_that_are_not_in_memory_are_refused(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places: dict[str, Any] = where | {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(base, device_map=places, offload_folder=tmp_path / "disk").eval()
    before = logits(model)
    with raises("target/weights-not-in-memory", match=r"the first is model\.layers\.1"):
        attach(model, SMALL)
    assert torch.equal(logits(model), before)
    with raises("base/weights-not-in-memory"):
        quantize(model, "nf4")
    with raises("target/weights-not-in-memory"):
        attach(tiny_model().to("meta"), SMALL)


def test_a_model_with_adapters_of_peft_is_refused_with_the_remedy() -> None:
    model = tiny_model()
    base = logits(model)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for each in (theirs, theirs.base_model.model):
        with raises("target/peft-adapters-on-model"):
            attach(each, SMALL)
    attach(theirs.unload(), SMALL)
    with deltas_off(model):
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, ["(gptq)", "gptqmodel"]),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}, ["(awq)", "gptqmodel"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["(bitsandbytes)", "pip install bitsandbytes"]),
        ({"load_in_8bit": True}, ["(bitsandbytes)", "pip install bitsandbytes"]),
        ({"quant_method": "hqq", "quant_config": {}}, ["(hqq)", "pip install hqq"]),
    ],
)
def test_a_folder_that_another_library_quantized_names_the_package(
    settings: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    base = save_tiny_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with raises("base/unloadable-base") as raised:
        load_base(base)
    for word in (*words, "quantization nf4"):
        assert word in str(raised.value)


def test_layers_quantized_by_another_library_are_no_sites_and_the_error_says_why() -> None:
    class Linear4bit(nn.Linear):
        def __init__(self) -> None:
            super().__init__(32, 32)
            self.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)

    model = tiny_model()
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in [n for n, _ in part.named_children() if n.endswith("_proj")]:
                setattr(part, name, Linear4bit())
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with raises("target/no-layer-matches", match=r"Linear4bit.*nf4"):
        attach(model, SMALL)
