"""Python and the command line ask an adapter with the chat template that it was trained with."""

from pathlib import Path
from typing import Any

import pytest

import graftlm
from graftlm.cli import _load
from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach, attachment, detach
from graftlm.model.load import load_base
from graftlm.model.store import TEMPLATE, load_adapter, save_adapter, template_of
from graftlm.testing import CHATML, tiny_tokenizer

OTHER = CHATML.replace("<|im_start|>assistant", "<|im_start|>bot")


@pytest.fixture
def adapter(base_folder: Path, tmp_path: Path) -> Path:
    """An adapter that was trained with another template than its base has."""
    model = load_base(str(base_folder)).model
    attach(model, LoraConfig(r=2))
    return save_adapter(model, tmp_path / "adapter", tokenizer=tiny_tokenizer(OTHER))


def asked(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The prompt that `answer` gives the model."""
    seen: list[list[int]] = []

    def generated(model: Any, prompts: Any, **_: Any) -> Any:
        seen.extend(list(prompt) for prompt in prompts)
        return iter([(0, [])])

    monkeypatch.setattr("graftlm.training.answer.generate", generated)
    graftlm.answer(model, tokenizer, "hello")
    return str(tokenizer.decode(seen[0]))


def test_python_and_the_command_line_ask_alike(
    adapter: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_base(str(base_folder))
    own = asked(model, tokenizer, monkeypatch)
    said = load_adapter(model, adapter)
    assert "answers use its chat template" in said
    assert "edited" not in said
    by_python = asked(model, tokenizer, monkeypatch)
    by_command = asked(*_load(str(base_folder), [adapter], network=False), monkeypatch)
    assert by_python == by_command
    assert by_python.endswith("<|im_start|>bot\n")
    assert own != by_python
    detach(model)
    assert asked(model, tokenizer, monkeypatch) == own


def test_a_template_that_was_edited_is_said(adapter: Path, base_folder: Path) -> None:
    (adapter / TEMPLATE).write_text(CHATML)
    assert "it was edited" in load_adapter(load_base(str(base_folder)).model, adapter)


def test_of_two_templates_the_last_is_used_and_that_is_said(adapter: Path, base_folder: Path, tmp_path: Path) -> None:
    model = load_base(str(base_folder)).model
    attach(model, LoraConfig(r=2), name="second")
    second = save_adapter(model, tmp_path / "second", name="second", tokenizer=tiny_tokenizer(CHATML))
    detach(model)
    load_adapter(model, adapter, name="first")
    assert "in place of that of first, which is another one" in load_adapter(model, second, name="second")
    assert template_of(model) == CHATML
    detach(model, "second")
    assert template_of(model) == OTHER
    assert list(attachment(model).templates) == ["first"]


def test_what_may_be_published_names_no_folder_of_this_machine(base_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(base_folder))
    attach(model, LoraConfig(r=2))
    folder = save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    for file in ("README.md", "adapter_config.json", "graftlm.json"):
        text = (folder / file).read_text()
        assert str(base_folder) not in text
        assert str(base_folder.parent) not in text
    assert f"base_model: {base_folder.name}\n" in (folder / "README.md").read_text()
