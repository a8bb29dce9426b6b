"""An adapter as a value: a folder read, written again and attached, without a model in between."""

import datetime
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.folder import CONFIG, HEADS, RECIPE, RECORD, SUMMARY, WEIGHTS
from graftlm.adapters.load import attach_adapter, load_adapter
from graftlm.adapters.save import adapter_of, save_adapter
from graftlm.deltas import METHODS
from graftlm.deltas.lora import LoraConfig
from graftlm.model.registry import Chat, attachment
from graftlm.testing import tiny_model, tiny_tokenizer
from graftlm.testing.deltas import logits, perturbed
from tests.adapters.folders import edit_config, ours, refused, write_record
from tests.errors import raises

BEFORE = Path(__file__).parents[1] / "golden" / "before_house"
VALUES = {
    "value-head.weight": torch.randn(1, 32, generator=torch.Generator().manual_seed(1)),
    "value-head.bias": torch.ones(1),
}


def full(model: Any = None) -> Adapter:
    """An adapter that has everything that one can have."""
    model = model or ours()
    attachment(model).chats["default"] = Chat("{{ messages }}", datetime.date(2026, 5, 4), "merge")
    made = adapter_of(model, tokenizer=tiny_tokenizer())
    return replace(made, recipe={"base": "b", "train": {"steps": 3}}, metrics={"train": {"steps": 3}}, heads=VALUES)


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_that_is_written_and_read_is_the_same(name: str, tmp_path: Path) -> None:
    adapter = adapter_of(perturbed(name, tiny_model()))
    assert Adapter.read(adapter.write(tmp_path / "a")) == adapter


def test_everything_in_an_adapter_comes_back(tmp_path: Path) -> None:
    adapter = full()
    again = Adapter.read(adapter.write(tmp_path / "a"))
    assert again == adapter
    assert again.chat.today == datetime.date(2026, 5, 4)
    assert again.chat.template == tiny_tokenizer().chat_template
    assert again.tokenizer_digest is not None
    assert again.source == tmp_path / "a"
    assert again.base is not None
    assert again.base["name"] == "LlamaForCausalLM"


def test_writing_again_what_was_read_gives_the_same_bytes(tmp_path: Path) -> None:
    first = full().write(tmp_path / "a")
    second = Adapter.read(first).write(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert {CONFIG, WEIGHTS, HEADS, RECORD, RECIPE, SUMMARY, "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert sorted(path.name for path in second.iterdir()) == names
    for name in names:
        assert (second / name).read_bytes() == (first / name).read_bytes(), name


def test_the_folder_of_save_adapter_is_that_of_its_value(tmp_path: Path) -> None:
    model = ours()
    saved, written = save_adapter(model, tmp_path / "a"), adapter_of(model).write(tmp_path / "b")
    for name in (CONFIG, WEIGHTS, RECORD):
        assert (saved / name).read_bytes() == (written / name).read_bytes(), name


def test_the_version_alone_may_differ(tmp_path: Path) -> None:
    folder = full().write(tmp_path / "a")
    record = json.loads((folder / RECORD).read_text())
    write_record(folder, record | {"graftlm": "0.0.9"})
    again = json.loads((Adapter.read(folder).write(tmp_path / "b") / RECORD).read_text())
    assert again.pop("sha256").keys() == record.pop("sha256").keys()
    assert again | {"graftlm": None} == record | {"graftlm": None}


def test_an_adapter_of_another_tool_is_a_value_too(foreign: Path, tmp_path: Path) -> None:
    adapter = Adapter.read(foreign)
    assert adapter.config is None
    assert adapter.base is None
    assert adapter.layout == "LORA"
    again = adapter.write(tmp_path / "again")
    assert Adapter.read(again) == adapter
    assert not (again / RECORD).exists()
    one, other = tiny_model(), tiny_model()
    load_adapter(one, foreign)
    attach_adapter(other, Adapter.read(again))
    assert torch.equal(logits(one), logits(other))


def test_loading_is_reading_and_attaching(adapter: Path) -> None:
    one, other = tiny_model(), tiny_model()
    note = load_adapter(one, adapter, name="a")
    value = Adapter.read(adapter)
    shutil.rmtree(adapter)  # a value needs its folder no longer
    assert attach_adapter(other, value, name="a") == note
    assert torch.equal(logits(one), logits(other))
    assert torch.equal(logits(one), logits(ours()))


def test_a_value_of_a_model_attaches_to_its_base() -> None:
    model, other = ours(LoraConfig(r=2, rslora=True)), tiny_model()
    assert "the adapter: 28 tensors" in attach_adapter(other, adapter_of(model))
    assert torch.equal(logits(other), logits(model))


def test_an_adapter_with_a_tokenizer_brings_it_to_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    attach_adapter(model, full(), name="a")
    assert attachment(model).tokenizers["a"].get_vocab() == tiny_tokenizer().get_vocab()
    assert attachment(model).chats["a"] == Chat(tiny_tokenizer().chat_template, datetime.date(2026, 5, 4), "merge")
    assert attachment(model).heads["a"] == VALUES


@pytest.mark.parametrize("method", ["lora", "mora", "adalora"])
def test_a_folder_of_before_is_read_and_written_anew(method: str, tmp_path: Path) -> None:
    adapter = Adapter.read(BEFORE / method)
    again = adapter.write(tmp_path / "again")
    assert Adapter.read(again) == adapter
    for name in (CONFIG, WEIGHTS):
        assert (again / name).read_bytes() == (BEFORE / method / name).read_bytes(), name


def test_adapters_differ_by_any_part() -> None:
    adapter = full()
    assert adapter == full()
    assert adapter != "adapter"
    moved = {key: tensor + 1 for key, tensor in adapter.tensors.items()}
    for change in (
        {"tensors": moved},
        {"seed": 4},
        {"heads": {}},
        {"recipe": {}},
        {"chat": adapter.chat._replace(today=None)},
    ):
        assert replace(adapter, **change) != adapter, change  # type: ignore[arg-type]
    assert replace(adapter, source=Path("elsewhere")) == adapter
    halves = {key: tensor.bfloat16() for key, tensor in adapter.tensors.items()}
    assert replace(adapter, tensors=halves) != adapter


# What is refused -------------------------------------------------------------------------------------------------
def test_a_folder_that_exists_is_not_replaced_unless_told(adapter: Path) -> None:
    value = replace(Adapter.read(adapter), seed=5)
    with raises("output/already-exists"):
        value.write(adapter)
    value.write(adapter, overwrite=True)
    assert Adapter.read(adapter).seed == 5
    assert not (adapter / "README.md").exists()


def test_damaged_heads_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    folder = full().write(tmp_path / "a")
    (folder / HEADS).write_bytes(b"no safetensors")
    with raises("adapter/checksum-mismatch", match=HEADS):
        Adapter.read(folder)


def test_heads_that_are_lost_or_were_added_are_refused(tmp_path: Path) -> None:
    folder = full().write(tmp_path / "a")
    (folder / HEADS).rename(tmp_path / HEADS)
    with raises("adapter/no-weights", match=HEADS):
        Adapter.read(folder)
    other = adapter_of(ours()).write(tmp_path / "b")
    shutil.copyfile(tmp_path / HEADS, other / HEADS)
    with raises("adapter/checksum-mismatch", match="no checksum"):
        Adapter.read(other)


def test_heads_must_be_finite_in_another_tools_folder_too(foreign: Path) -> None:
    save_file({"value-head.bias": torch.tensor([float("nan")])}, foreign / HEADS)
    with raises("adapter/not-weights", match=HEADS):
        Adapter.read(foreign)


def test_a_day_that_is_none_leaves_the_model_as_it_was(adapter: Path, tokenizer: Any) -> None:
    record = json.loads((adapter / RECORD).read_text())
    write_record(adapter, record | {"today": "tomorrow"})
    (adapter / "chat_template.jinja").write_text(tokenizer.chat_template)
    refused(adapter, "adapter/invalid-date", "tomorrow")


def test_a_value_that_does_not_fit_leaves_the_model_as_it_was(adapter: Path) -> None:
    value = Adapter.read(adapter)
    key = next(iter(value.tensors))
    model = tiny_model()
    before = logits(model)
    with raises("adapter/does-not-fit-model", match="missing"):
        attach_adapter(model, replace(value, tensors={k: t for k, t in value.tensors.items() if k != key}))
    with raises("base/other-base"):
        attach_adapter(tiny_model(seed=9), value)
    assert not attachment(model).configs
    assert torch.equal(logits(model), before)


def test_an_edited_config_is_refused_without_a_model(adapter: Path) -> None:
    edit_config(adapter, r=5)
    with raises("adapter/checksum-mismatch", match=CONFIG):
        Adapter.read(adapter)


def test_the_tensors_are_those_of_the_file(adapter: Path) -> None:
    stored = load_file(adapter / WEIGHTS)
    found = Adapter.read(adapter).tensors
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[key], stored[key]) for key in stored)
