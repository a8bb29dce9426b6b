"""A delta on disk: the same bits back, PEFT's in and out, and nothing that does not fit gets in or is lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from graftlm.adapters.folder import CONFIG, RECORD, WEIGHTS
from graftlm.adapters.foreign.config import HARMLESS
from graftlm.adapters.load import load_adapter
from graftlm.adapters.peft import NEUTRAL, NEUTRAL_ANYWHERE
from graftlm.adapters.save import save_adapter
from graftlm.deltas import METHODS
from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach
from graftlm.model.modes import activate
from graftlm.model.registry import attachment, hosts, trainable
from graftlm.model.state_dict import merged_state
from graftlm.testing import tiny_model
from graftlm.testing.deltas import logits
from tests.adapters.folders import edit_config, edit_tensors, ours
from tests.errors import raises
from tests.peers import LAYERS, factors_of_ours, factors_of_peft, peft_model, relative_error

pytestmark = pytest.mark.versions


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


# There and back --------------------------------------------------------------------------------------------------
def test_a_loaded_adapter_computes_the_same_bits_and_says_what_was_checked(tmp_path: Path) -> None:
    model = ours(LoraConfig(r=4, alpha=6, rslora=True, patterns={"q_proj": {"r": 2}, "up_proj": {"alpha": 9}}))
    folder = save_adapter(model, tmp_path / "a")
    other = tiny_model()
    note = load_adapter(other, folder)
    assert torch.equal(logits(other), logits(model))
    assert "28 tensors" in note  # A and B on seven layers of two blocks
    assert "fingerprint match" in note
    assert attachment(other).configs == attachment(model).configs


def test_an_adapter_trained_with_dropout_answers_without(tmp_path: Path) -> None:
    folder = save_adapter(ours(LoraConfig(r=4, dropout=0.5)), tmp_path / "a")
    model = tiny_model()
    load_adapter(model, folder)
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model), logits(ours(LoraConfig(r=4))))


def test_two_saves_give_the_same_bytes_in_every_file(tmp_path: Path) -> None:
    first, second = (save_adapter(ours(), tmp_path / name) for name in "ab")
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted([CONFIG, WEIGHTS, RECORD, "README.md"])
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_one_of_two_deltas_is_saved_by_its_name_and_loads_under_another(tmp_path: Path) -> None:
    model = ours(name="one")
    attach(model, LoraConfig(r=2), name="two", targets=("q_proj",), seed=5)
    with torch.no_grad():
        for key, parameter in factors_of_ours(model, "two").items():
            parameter.add_(0.1 if key.endswith("B") else 0)
    activate(model, "two")
    folder = save_adapter(model, tmp_path / "a", name="two")
    other = ours(name="one")
    load_adapter(other, folder, name="three")
    activate(other, "three")
    assert torch.equal(logits(other), logits(model))
    with raises("adapter/no-such-delta", match="'tow'.*'two'"):
        save_adapter(model, tmp_path / "b", name="tow")
    assert not (tmp_path / "b").exists()


def test_the_tokenizer_and_the_exact_chat_template_are_written(tmp_path: Path, tokenizer: Any) -> None:
    folder = save_adapter(ours(), tmp_path / "a", tokenizer=tokenizer)
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == tokenizer.chat_template
    assert (folder / "tokenizer.json").is_file()


def test_the_model_card_is_filled_in(adapter: Path) -> None:
    card = (adapter / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: LlamaForCausalLM\n")
    record = json.loads((adapter / RECORD).read_text())
    assert record["base"]["digest"] in card
    assert "More Information" not in card


# PEFT, both ways -------------------------------------------------------------------------------------------------
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("llama", {"r": 4, "alpha": 6}, {"r": 4, "lora_alpha": 6}),
    "rslora": ("llama", {"r": 4, "alpha": 6, "rslora": True}, {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "some layers": (
        "llama",
        {"r": 4, "targets": ("q_proj", "v_proj")},
        {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    ),
    "one layer": (
        "llama",
        {"r": 4, "targets": r".*layers\.1\.mlp\.up_proj"},
        {"r": 4, "lora_alpha": 32, "target_modules": r".*layers\.1\.mlp\.up_proj"},
    ),
    "patterns": (
        "llama",
        {
            "r": 4,
            "alpha": 6,
            "rslora": True,
            "patterns": {r"0\.self_attn\.q_proj": {"r": 2, "alpha": 3}, "down_proj": {"alpha": 9}},
        },
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "rank_pattern": {r"0\.self_attn\.q_proj": 2},
            "alpha_pattern": {r"0\.self_attn\.q_proj": 3, "down_proj": 9},
        },
    ),
    "transposed layers": (
        "gpt2",
        {"r": 4, "alpha": 6, "patterns": {"c_fc": {"r": 5}}},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"c_fc": 5}},
    ),
    "untied head": (
        "llama",
        {"r": 4, "targets": ("q_proj", "lm_head")},
        {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "lm_head"]},
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_peft_loads_ours_and_computes_the_same(case: str, tmp_path: Path) -> None:
    kind, config, _ = SETTINGS[case]
    changes = {"tie_word_embeddings": False} if case == "untied head" else {}
    model = ours(LoraConfig(**config), kind=kind, **changes)
    folder = save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(tiny_model(kind, **changes), folder).eval()
    mine = factors_of_ours(model)
    found = factors_of_peft(theirs)
    assert found.keys() == mine.keys()
    assert all(torch.equal(found[key], mine[key]) for key in mine)
    assert float((logits(theirs) - logits(model)).abs().max()) <= 1e-5


@pytest.mark.parametrize("case", SETTINGS)
def test_ours_loads_what_peft_wrote_and_computes_the_same(case: str, tmp_path: Path) -> None:
    kind, _, settings = SETTINGS[case]
    changes = {"tie_word_embeddings": False} if case == "untied head" else {}
    theirs = peft_model(tiny_model(kind, **changes), **settings)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    model = tiny_model(kind, **changes)
    note = load_adapter(model, tmp_path / "a")
    assert "another tool" in note
    assert "that the base is the right one was not" in note
    assert float((logits(theirs) - logits(model)).abs().max()) <= 1e-5


def test_what_peft_wrote_and_we_wrote_again_is_still_the_same_in_peft(tmp_path: Path) -> None:
    theirs = peft_model(tiny_model(), **SETTINGS["patterns"][2])
    theirs.save_pretrained(tmp_path / "a")
    model = tiny_model()
    load_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "b").eval()
    assert torch.equal(logits(again), logits(theirs))


def test_our_merge_is_pefts_merge() -> None:
    theirs = peft_model(tiny_model(), r=4, lora_alpha=6)
    model = attach(tiny_model(), LoraConfig(r=4, alpha=6))
    source = factors_of_peft(theirs)
    with torch.no_grad():
        for key, parameter in factors_of_ours(model).items():
            parameter.copy_(source[key])
    wanted = theirs.merge_and_unload().state_dict()
    found = merged_state(model)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert relative_error(found[key], wanted[key]) <= 1e-6, key


def test_the_names_in_the_file_are_pefts(adapter: Path) -> None:
    with safe_open(adapter / WEIGHTS, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        names = set(handle.keys())
    assert {f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"} <= names
    stored = json.loads((adapter / CONFIG).read_text())
    assert sorted(stored["target_modules"]) == sorted(LAYERS["llama"])
    assert (stored["peft_type"], stored["r"], stored["lora_alpha"], stored["use_rslora"]) == ("LORA", 4, 6, False)


def test_every_key_that_peft_writes_is_known_here(tmp_path: Path) -> None:
    peft_model(tiny_model(), r=4).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG).read_text())
    layout = METHODS["lora"].delta.peft
    assert layout is not None
    known = {*layout.fields.values(), *layout.patterns.values(), *layout.constants}
    assert stored.keys() <= NEUTRAL.keys() | NEUTRAL_ANYWHERE.keys() | HARMLESS | known


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", False])
def test_starts_that_leave_the_base_alone_are_loaded(foreign: Path, start: Any) -> None:
    edit_config(foreign, init_lora_weights=start)
    model = tiny_model()
    load_adapter(model, foreign)
    assert torch.equal(logits(model), logits(ours()))


def test_a_bf16_adapter_of_another_tool_is_loaded_in_float32(foreign: Path) -> None:
    edit_tensors(foreign, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    model = tiny_model()
    load_adapter(model, foreign)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    wanted = load_file(foreign / WEIGHTS)[f"{Q0}.lora_B.weight"].float()
    assert torch.equal(factors_of_ours(model)["model.layers.0.self_attn.q_proj.B"], wanted)


def test_a_moved_adapter_still_loads(adapter: Path, tmp_path: Path) -> None:
    shutil.move(adapter, tmp_path / "elsewhere")
    model = tiny_model()
    load_adapter(model, tmp_path / "elsewhere")
    assert len(hosts(model)) == 14


def test_the_only_delta_needs_no_name_to_be_saved(tmp_path: Path) -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=2), name="mine")
    save_adapter(model, tmp_path / "a")
    attach(model, LoraConfig(r=2), name="yours")
    with raises("adapter/no-such-delta", match="'default'"):
        save_adapter(model, tmp_path / "b")
    save_adapter(model, tmp_path / "b", name="yours")
