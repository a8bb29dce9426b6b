"""Models and configs of PEFT, edits of the folder of an adapter, and that loading one is refused."""

import json
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.adapters.folder import CONFIG, WEIGHTS
from graftlm.adapters.load import load_adapter
from graftlm.model.registry import attachment
from graftlm.testing import tiny_model
from tests.errors import raises

LM: Any = {"task_type": "CAUSAL_LM"}


QV = ["q_proj", "v_proj"]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": QV, **LM, **settings})


def tied() -> Any:
    return tiny_model()


def untied() -> Any:
    return tiny_model(tie_word_embeddings=False)


def with_biases() -> Any:
    return tiny_model("qwen2")


def with_biases_untied() -> Any:
    return tiny_model("qwen2", tie_word_embeddings=False)


def resized(base: Callable[[], Any], seed: int) -> Any:
    """A base with four more tokens, whose embeddings are random: others with another seed."""
    model = base()
    torch.manual_seed(seed)
    model.resize_token_embeddings(304, mean_resizing=False)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in (tree | changes).items() if v is not MISSING}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / WEIGHTS)


def refused(folder: Path, code: str, *words: str, model: Any = None) -> str:
    """Loading must raise an error of this code with all of these words, and leave the model as it was; the message."""
    model = tied() if model is None else model
    before = dict(model.named_modules())
    with raises(code) as raised:
        load_adapter(model, folder)
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)
    assert dict(model.named_modules()) == before
    assert attachment(model).configs == {}
    return str(raised.value)
