"""Adapters for the tests of libraries: plain LoRA in PEFT's files, from numbers alone."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from graftlm.adapters.adapter import Adapter

SITES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (32, 48)}
"""Site -> (d_out, d_in), of the tiny model."""
PREFIX = "base_model.model."


def factors(seed: int, r: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> (A, B), float64."""
    random = torch.Generator().manual_seed(seed)
    draw = {"generator": random, "dtype": torch.float64}
    return {
        site: (torch.randn(r, d_in, **draw), torch.randn(d_out, r, **draw)) for site, (d_out, d_in) in SITES.items()
    }


def in_other_factors(given: dict[str, tuple[Tensor, Tensor]], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The same changes as (R^-1 A, B R)."""
    random, made = torch.Generator().manual_seed(seed), {}
    for site, (A, B) in given.items():
        R = torch.randn(len(A), len(A), generator=random, dtype=torch.float64) + 2 * torch.eye(len(A))
        made[site] = torch.linalg.solve(R, A), B @ R
    return made


def adapter(given: dict[str, tuple[Tensor, Tensor]], *, alpha: float = 8.0, **config: Any) -> Adapter:
    """As PEFT would write it, float32."""
    tensors = {}
    for site, (A, B) in given.items():
        tensors |= {f"{PREFIX}{site}.lora_A.weight": A.float(), f"{PREFIX}{site}.lora_B.weight": B.float()}
    r = len(next(iter(given.values()))[0])
    ranks = {re.escape(site): len(A) for site, (A, _) in given.items() if len(A) != r}
    stored = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "base_model_name_or_path": "tiny",
    }
    return Adapter(tensors, stored | {"target_modules": ["q_proj", "down_proj"]} | config)


def write(folder: Path, seed: int, r: int = 4, **config: Any) -> Path:
    adapter(factors(seed, r), **config).write(folder)
    return folder


def dense(one: Adapter) -> dict[str, Tensor]:
    """Site -> D by the definition of PEFT, float64: independent of the library's reading."""
    stored, made = one.peft_config, {}
    for site in SITES:
        A = one.tensors.get(f"{PREFIX}{site}.lora_A.weight")
        if A is None:
            continue
        alpha = dict(stored.get("alpha_pattern", {})).get(site.rpartition(".")[2], stored["lora_alpha"])
        scale = alpha / (len(A) ** 0.5 if stored.get("use_rslora") else len(A))
        made[site] = scale * one.tensors[f"{PREFIX}{site}.lora_B.weight"].double() @ A.double()
    return made


def edit(file: Path, **changes: Any) -> None:
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | changes))


def save_plain(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
