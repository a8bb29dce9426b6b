"""Folders of random adapters of one tiny base, and what each of them answers alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.deltas.base import DeltaConfig
from graftlm.deltas.lora import LoraConfig
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.model.attach import attach, detach
from graftlm.testing import tiny_model
from graftlm.testing.deltas import move

CONFIG = LoraConfig(r=4, alpha=8)


def spread(model: Any) -> Any:
    """With matrices so large that its answers differ from prompt to prompt."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def base() -> Any:
    return spread(tiny_model())


def write_adapter(folder: Path, seed: int, config: DeltaConfig = CONFIG, *, tokenizer: Any = None) -> Path:
    """A random adapter of `base`, another one for each seed; in place of what lies there."""
    model = base()
    attach(model, config, seed=seed)
    move(model, scale=0.5, seed=seed)
    return save_adapter(model, folder, tokenizer=tokenizer, overwrite=True)


def alone(folder: Path | None, asked: Sequence[Sequence[int]], count: int = 6) -> list[list[int]]:
    """The greedy answers of the base with one adapter, or without, on a model of its own."""
    model = base()
    if folder is not None:
        load_adapter(model, folder)
    engine = Engine(model, prepack=False)
    found = [engine.wait(engine.submit(Request(ids, count))).ids for ids in asked]
    detach(model)
    return found
