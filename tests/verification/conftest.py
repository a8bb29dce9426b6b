"""A base whose answers are ASCII and differ from prompt to prompt, and adapters of it."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graftlm.verification.local as verify_local
from graftlm.adapters.save import save_adapter
from graftlm.data.chat.render import Renderer
from graftlm.hub.load import load_base
from graftlm.testing.deltas import attach_tiny, move
from graftlm.testing.tiny import CHATML, tiny_model, tiny_tokenizer

OTHER_TEMPLATE = CHATML.replace("<|im_start|>assistant", "<|im_start|>bot")

AdapterMaker = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_process_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each renderer starts a process; those of a template do the same, as there is one tokenizer."""
    monkeypatch.setattr(verify_local, "Renderer", _renderer)


_RENDERERS: dict[Any, Renderer] = {}


def _renderer(tokenizer: Any, template: str, *, today: datetime.date) -> Renderer:
    key = template, today
    if key not in _RENDERERS:
        _RENDERERS[key] = Renderer(tokenizer, template, today=today)
    return _RENDERERS[key]


@pytest.fixture(scope="session")
def spread_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spread") / "base"
    model, tokenizer = tiny_model(initializer_range=0.2), tiny_tokenizer()
    texts = [tokenizer.decode([number]) for number in range(300)]
    with torch.no_grad():
        for number, text in enumerate(texts):
            if not text.isascii() or not text.isprintable() or text.startswith("<|"):
                model.model.embed_tokens.weight[number] *= 0.02
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_of(spread_base: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterMaker:
    """Writes an adapter: adapter_of("lora", scale=..., seed=..., template=..., ...its config). One folder for each."""
    made: dict[Any, Path] = {}

    def make(method: str, *, scale: float = 0.1, seed: int = 1, template: str | None = CHATML, **config: Any) -> Path:
        key = (method, scale, seed, template, tuple(config.items()))
        if key not in made:
            model = load_base(str(spread_base), dtype="float32").model
            move(attach_tiny(method, model, **config), scale=scale, seed=seed)
            folder = tmp_path_factory.mktemp("adapter") / f"{method}-{len(made)}"
            tokenizer = None if template is None else tiny_tokenizer(template)
            made[key] = save_adapter(model, folder, tokenizer=tokenizer)
        return made[key]

    return make
