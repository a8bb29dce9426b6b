"""PEFT's LoRA on the same tiny model, with the same factors: the independent implementation to compare with."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor

from graftlm.model.registry import hosts
from graftlm.testing.deltas import move

LAYERS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def peft_model(model: Any, **settings: Any) -> Any:
    """PEFT's wrapper around `model`, in evaluation mode, with every factor away from zero."""
    kind = model.config.model_type
    settings.setdefault("target_modules", LAYERS[kind])
    wrapped = get_peft_model(
        model, PeftLoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2", **settings)
    ).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in factors_of_peft(wrapped).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def peft_adapter(config: Any, base: Any, folder: Path, **options: Any) -> Any:
    """PEFT's adapter on a base, away from its start, written into a folder; PEFT's model."""
    theirs = move(get_peft_model(base, config), seed=7).eval()
    theirs.save_pretrained(folder, **options)
    return theirs


def factors_of_peft(wrapped: Any) -> dict[str, Any]:
    """`<site>.A` and `<site>.B` of a PEFT model."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.default.weight", ".A")
        .replace(".lora_B.default.weight", ".B"): parameter
        for name, parameter in wrapped.named_parameters()
        if ".lora_" in name
    }


def factors_of_ours(model: Any, name: str = "default") -> dict[str, Any]:
    """`<site>.A` and `<site>.B` of a model with our LoRA on it."""
    return {
        f"{site}.{key}": parameter
        for site, host in hosts(model).items()
        if name in host.deltas
        for key, parameter in host.deltas[name].named_parameters()
    }


def copy_factors(source: dict[str, Any], target: dict[str, Any]) -> None:
    assert source.keys() == target.keys()
    with torch.no_grad():
        for key, parameter in target.items():
            assert parameter.shape == source[key].shape, key
            parameter.copy_(source[key])


def relative_error(ours: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    assert ours.shape == wanted.shape
    return float((ours.detach() - wanted.detach()).abs().max() / wanted.detach().abs().max())
