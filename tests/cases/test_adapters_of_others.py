"""Adapter folders as people have them: made by other tools and versions, with a vocabulary of their own.

The cases are from public reports; each test names them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

import graftlm
from graftlm import cli
from graftlm.adapters.chat import template_of, tokenizer_of
from graftlm.adapters.folder import CONFIG, WEIGHTS
from graftlm.adapters.load import load_adapter
from graftlm.hub.load import load_base
from graftlm.testing import tiny_model, tiny_tokenizer
from graftlm.testing.deltas import close, logits
from tests.errors import raises
from tests.peers import peft_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

LM: Any = {"task_type": "CAUSAL_LM"}
QV = ["q_proj", "v_proj"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


def tokenizer_with(*tokens: str, template: str = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer(template=None)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return tokenizer


# A tokenizer that training added tokens to (LlamaFactory#4408, unsloth#3428) ------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base with embeddings for twenty more tokens than its tokenizer has."""
    tiny_model(vocab_size=320).save_pretrained(tmp_path / "base")
    tiny_tokenizer(template=None).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    peft_adapter(LoraConfig(r=4, target_modules=["q_proj"], **LM), tiny_model(vocab_size=320), tmp_path / "adapter")
    tokenizer_with("<|user|>", "<|end|>").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of each prompt that the model is asked with."""
    seen: list[list[int]] = []

    def recording_generate(model: Any, rows: Any, **options: Any) -> Any:
        seen.extend(row.tolist() for row in rows)
        return iter([(0, [70, 71])])

    monkeypatch.setattr("graftlm.generation.answer.generate", recording_generate)
    return seen


def expected(text: str) -> list[int]:
    turns = [{"role": "user", "content": text}]
    ids: list[int] = tokenizer_with("<|user|>", "<|end|>").apply_chat_template(turns, return_dict=False)
    assert {300, 301} < set(ids)
    return ids


def graft(*arguments: Any, text: str | None = None) -> str:
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments], input=text)
    assert result.exit_code == 0, result.output
    return result.output


def test_generate_and_chat_ask_with_the_tokenizer_of_the_adapter(
    base: Path, adapter: Path, prompts: list[list[int]]
) -> None:
    options = ("--base", base, "--adapter", adapter, "--dtype", "float32")
    graft("generate", "parcel", *options)
    graft("chat", *options, text="parcel\n/quit\n")
    assert prompts == [expected("parcel")] * 2


def test_answer_in_python_asks_with_the_tokenizer_of_the_adapter(
    base: Path, adapter: Path, prompts: list[list[int]]
) -> None:
    model, tokenizer = load_base(base, dtype="float32")
    load_adapter(model, adapter)
    graftlm.answer(model, tokenizer, "parcel")
    graftlm.answer(tiny_model_with(adapter), tokenizer, "parcel")  # of a base that came from no folder
    assert prompts == [expected("parcel")] * 2


def tiny_model_with(adapter: Path) -> Any:
    model = tiny_model(vocab_size=320)
    load_adapter(model, adapter)
    return model


def test_a_merged_model_has_the_tokenizer_of_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    graft("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "merged", "--base-dtype", "float32")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.apply_chat_template([{"role": "user", "content": "parcel"}], return_dict=False) == expected("parcel")
    assert merged.convert_tokens_to_ids("<|end|>") == 301
    generation_config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert 301 in generation_config["eos_token_id"]


def test_a_template_in_the_tokenizers_config_is_the_adapters_too(base: Path, adapter: Path) -> None:
    """As transformers wrote it before there was a file for it."""
    (adapter / "chat_template.jinja").unlink()
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    templates = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "{{ messages }}"}]
    for form in (TEMPLATE, templates):
        (adapter / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": form}))
        model, _ = load_base(base, dtype="float32")
        assert load_adapter(model, adapter).endswith("answers use its chat template")
        assert template_of(model) == TEMPLATE


def test_a_tokenizer_with_other_ids_is_refused_by_name(base: Path, adapter: Path, prompts: list[list[int]]) -> None:
    tokens = json.loads((adapter / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (adapter / "tokenizer.json").write_text(json.dumps(tokens))
    model, tokenizer = load_base(base, dtype="float32")
    with raises("adapter/tokenizer-mismatch", match=r"2 of \d+ tokens") as raised:
        load_adapter(model, adapter)
    assert f"'a': {vocabulary['b']} here, {vocabulary['a']} in the adapter's" in str(raised.value)
    assert str(adapter) in str(raised.value)
    assert not any("graft" in name for name, _ in model.named_modules())
    with raises("adapter/tokenizer-mismatch", match="'a': "):  # of a base that came from no folder
        graftlm.answer(tiny_model_with(adapter), tokenizer, "parcel")
    assert prompts == []


def test_a_tokenizer_that_lacks_tokens_of_the_base_is_refused(base: Path, adapter: Path) -> None:
    tokenizer_with("<|user|>", "<|end|>", "<|call|>").save_pretrained(base)
    with raises("adapter/tokenizer-mismatch", match=r"'<\|call\|>': 302 here, none in"):
        load_adapter(load_base(base, dtype="float32").model, adapter)


@pytest.mark.parametrize("from_folder", [True, False])
def test_tokens_without_embeddings_are_refused_and_taken_once_the_base_is_resized(
    base: Path, adapter: Path, from_folder: bool
) -> None:
    small = tiny_model(vocab_size=301)
    if from_folder:
        small.save_pretrained(base)
        small = load_base(base, dtype="float32").model
    with raises("adapter/tokens-without-embeddings", match="1 tokens") as raised:
        load_adapter(small, adapter)
    assert "'<|end|>': 301" in str(raised.value)
    assert "model.resize_token_embeddings" in str(raised.value)
    small.resize_token_embeddings(302, mean_resizing=False)
    load_adapter(small, adapter)
    assert len(tokenizer_of(small, tiny_tokenizer(template=None))) == len(tokenizer_with("<|user|>", "<|end|>"))


def test_two_adapters_may_add_the_same_tokens_and_not_different_ones_under_one_id(
    adapter: Path, tmp_path: Path
) -> None:
    for name, tokens in {"more": ("<|user|>", "<|end|>", "<|call|>"), "other": ("<|human|>", "<|end|>")}.items():
        peft_adapter(LoraConfig(r=4, target_modules=["q_proj"], **LM), tiny_model(vocab_size=320), tmp_path / name)
        tokenizer_with(*tokens).save_pretrained(tmp_path / name)
    plain = tiny_tokenizer(template=None)
    for order in ([adapter, tmp_path / "more"], [tmp_path / "more", adapter]):
        model = tiny_model(vocab_size=320)
        for number, folder in enumerate(order):
            load_adapter(model, folder, name=f"n{number}")
        assert tokenizer_of(model, plain).convert_tokens_to_ids("<|call|>") == 302
    load_adapter(model, tmp_path / "other", name="other")
    with raises("adapter/tokenizer-mismatch", match=r"other: .*\n  '<\|user\|>': 300 here, none in"):
        tokenizer_of(model, plain)


def test_a_damaged_tokenizer_is_refused_and_none_is_the_bases(base: Path, adapter: Path) -> None:
    file = adapter / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:1000])
    model, tokenizer = load_base(base, dtype="float32")
    with raises("adapter/unloadable-tokenizer") as raised:
        load_adapter(model, adapter)
    assert str(file) in str(raised.value)
    file.unlink()
    load_adapter(model, adapter)
    assert tokenizer_of(model, tokenizer) is tokenizer


# Configs of other versions and tools ---------------------------------------------------------------------------------

OLD = {
    "auto_mapping": None,
    "base_model_name_or_path": "some/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "revision": None,
    "target_modules": QV,
    "task_type": "CAUSAL_LM",
}
"""What PEFT 0.4 wrote."""

CONFIGS = {
    "0.2": OLD | {"enable_lora": None, "merge_weights": False},
    "0.4": OLD,
    "0.8": OLD
    | {"rank_pattern": {}, "alpha_pattern": {}, "loftq_config": {}, "megatron_config": None}
    | {"megatron_core": "megatron.core", "use_rslora": False},
    "by hand": {key: OLD[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")},
}


@pytest.mark.parametrize("version", CONFIGS)
def test_configs_from_before_dora_are_plain_lora(version: str, tmp_path: Path) -> None:
    """lmdeploy#2020, and every adapter of before March 2024."""
    theirs = peft_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=QV, **LM), tiny_model(), tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text(json.dumps(CONFIGS[version]))
    ours = tiny_model()
    load_adapter(ours, tmp_path / "a")
    close(logits(ours), logits(theirs), version)


# What recipes of other tools make -------------------------------------------------------------------------------------

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": QV, **LM, **settings})


def phi3() -> Any:
    return tiny_model("phi3")


def untied() -> Any:
    return tiny_model(tie_word_embeddings=False)


def qwen2() -> Any:
    return tiny_model("qwen2")


RECIPES: dict[str, tuple[LoraConfig, Callable[[], Any]]] = {
    "Unsloth's seven names on Phi-3 (vllm#4915, unsloth#3405, peft#1959)": (lora(target_modules=SEVEN), phi3),
    "the head of a tied model (peft#2092, peft#2018)": (lora(target_modules=["lm_head", "q_proj"]), tiny_model),
    "the head and the embeddings of one": (lora(target_modules=["lm_head", "embed_tokens", "q_proj"]), tiny_model),
    "continued pretraining with dropout": (lora(lora_dropout=0.05, target_modules=["embed_tokens", *QV]), tiny_model),
    "one layer (peft#3610, peft#3028)": (lora(layers_to_transform=[1]), tiny_model),
    "all but one kind": (lora(target_modules="all-linear", exclude_modules=["down_proj"]), tiny_model),
    "a head of its own (vllm#14978, unsloth#1343)": (lora(modules_to_save=["lm_head"]), untied),
    "head and embeddings (peft#1300)": (lora(modules_to_save=["lm_head", "embed_tokens"]), untied),
    "new tokens (peft#2376, peft#2898)": (lora(trainable_token_indices=[5, 6]), tiny_model),
    "embeddings and head kept tied": (lora(target_modules=["embed_tokens", *QV], ensure_weight_tying=True), tiny_model),
    "biases": (lora(bias="lora_only"), qwen2),
    "biases of the factors": (lora(lora_bias=True), qwen2),
    "magnitudes of embeddings": (lora(use_dora=True, target_modules=["embed_tokens", *QV]), tiny_model),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_peft_loads_loads_here_and_answers_the_same(recipe: str, tmp_path: Path) -> None:
    config, base = RECIPES[recipe]
    theirs = peft_adapter(config, base(), tmp_path / "a")
    ours = base()
    load_adapter(ours, tmp_path / "a")
    close(logits(ours), logits(theirs), recipe)


def test_embeddings_beside_an_adapter_of_a_resized_vocabulary(tmp_path: Path) -> None:
    """unsloth#943, unsloth#978, unsloth#237, peft#1457."""

    def resized(seed: int) -> Any:
        model = untied()
        torch.manual_seed(seed)
        model.resize_token_embeddings(304, mean_resizing=False)
        return model

    theirs = peft_adapter(lora(), resized(1), tmp_path / "a", save_embedding_layers=True)
    ours = resized(2)
    note = load_adapter(ours, tmp_path / "a")
    assert "from row 300 on, model.embed_tokens is the adapter's" in note
    with torch.no_grad():
        rows = torch.tensor([[300, 5, 303]])
        close(ours(input_ids=rows).logits, theirs(input_ids=rows).logits, "the new tokens")
    with raises("adapter/does-not-fit-model", match=r"model\.resize_token_embeddings\(304\)"):
        load_adapter(untied(), tmp_path / "a")


def test_an_adapter_in_float8_is_read(tmp_path: Path) -> None:
    peft_adapter(lora(), tiny_model(), tmp_path / "a")
    tensors = {k: t.to(torch.float8_e4m3fn) for k, t in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    ours, wide = tiny_model(), tiny_model()
    load_adapter(ours, tmp_path / "a")
    save_file({k: t.float() for k, t in tensors.items()}, tmp_path / "a" / WEIGHTS)
    load_adapter(wide, tmp_path / "a")
    assert torch.equal(logits(ours), logits(wide))


def test_experts_in_one_parameter_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """vllm#41384, unsloth#6930."""

    def moe() -> Any:
        return tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2)

    peft_adapter(lora(target_parameters=["mlp.experts.gate_up_proj"]), moe(), tmp_path / "a")
    with raises("adapter/fused-experts", match="target_parameters"):
        load_adapter(moe(), tmp_path / "a")
