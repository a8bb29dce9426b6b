"""A base with adapters on it: names, order, tokenizer and chat template."""

from pathlib import Path

import torch

from graftlm.adapters.load import load_adapter, load_with_adapters
from graftlm.adapters.save import save_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.hub.load import load_base
from graftlm.model.attach import attach
from graftlm.model.registry import attachment
from graftlm.testing import tiny_tokenizer
from graftlm.testing.deltas import logits, move
from graftlm.testing.tiny import CHATML

OTHER = CHATML.replace("<|im_start|>assistant", "<|im_start|>bot")


def saved(base: Path, folder: Path, seed: int, template: str = CHATML) -> Path:
    model = load_base(str(base)).model
    attach(model, LoraConfig(r=2), seed=seed)
    move(model, seed=seed)
    return save_adapter(model, folder, tokenizer=tiny_tokenizer(template))


def test_an_only_adapter_keeps_its_name(base_folder: Path, tmp_path: Path) -> None:
    loaded = load_with_adapters(str(base_folder), [saved(base_folder, tmp_path / "a", 1, OTHER)])
    assert list(attachment(loaded.model).configs) == ["default"]
    assert loaded.tokenizer.chat_template == OTHER
    assert len(loaded.messages) == 1


def test_several_adapters_are_numbered_and_all_active(base_folder: Path, tmp_path: Path) -> None:
    folders = [saved(base_folder, tmp_path / "a", 1), saved(base_folder, tmp_path / "b", 2, OTHER)]
    loaded = load_with_adapters(str(base_folder), folders)
    assert list(attachment(loaded.model).configs) == ["1-default", "2-default"]
    assert loaded.tokenizer.chat_template == OTHER, "the last one's"
    by_hand = load_base(str(base_folder)).model
    for name, folder in zip(("one", "two"), folders, strict=True):
        load_adapter(by_hand, folder, name=name)
    assert torch.equal(logits(loaded.model), logits(by_hand))


def test_a_base_alone_keeps_its_template(base_folder: Path) -> None:
    model, tokenizer, messages = load_with_adapters(str(base_folder), [])
    assert tokenizer.chat_template == load_base(str(base_folder)).tokenizer.chat_template
    assert messages == []
