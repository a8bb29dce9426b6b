"""A model with our LoRA, edits of the folder of an adapter, and that loading one is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from graftlm.adapters.folder import CONFIG, RECORD, WEIGHTS, sha256_of_record
from graftlm.adapters.load import load_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach
from graftlm.model.registry import attachment, trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import logits
from tests.errors import raises


def ours(config: LoraConfig | None = None, *, kind: str = "llama", name: str = "default", **changes: Any) -> Any:
    """A tiny model with our LoRA on it, away from its start."""
    model = tiny_model(kind, **changes)
    attach(model, config or LoraConfig(r=4, alpha=6), name=name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def refused(folder: Path, code: str, *words: str, model: Any = None) -> str:
    """Loading must raise an error of this code with all of these words, and leave the model as it was; the message."""
    model = tiny_model() if model is None else model
    modules, before = dict(model.named_modules()), logits(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    deltas = dict(attachment(model).configs)
    with raises(code) as raised:
        load_adapter(model, folder, name="new")
    for word in words:
        assert word in str(raised.value)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[key] is modules[key] for key in modules)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learning
    assert attachment(model).configs == deltas
    assert torch.equal(logits(model), before)
    return str(raised.value)


def edit_config(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(tree | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """graftlm.json with this record, as a program that signs it leaves it."""
    sums = {name: digest for name, digest in record["sha256"].items() if name != RECORD}
    signed = {**record, "sha256": sums | {RECORD: sha256_of_record({**record, "sha256": sums})}}
    (folder / RECORD).write_text(json.dumps(signed))
