"""A base by its name -> model and tokenizer.

Weights come from safetensors only, code that ships with a model is not run, and nothing is fetched unless asked.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from graftlm.errors import BaseModelError, first_lines
from graftlm.hub.config import BaseConfig, base_config
from graftlm.hub.dtypes import resolve_dtype
from graftlm.hub.fingerprint import BaseRecord
from graftlm.hub.locate import hub_hint, locate
from graftlm.hub.quantize_base import cast_bfloat16, checked_quantization, quantize
from graftlm.hub.tokenizer import tokenizer_at
from graftlm.system import return_freed_memory


class Loaded(NamedTuple):
    """A base: unpack it as `model, tokenizer = load_base(name)`."""

    model: nn.Module
    tokenizer: Any


def load_base(
    base: str | Path | BaseConfig = "smollm2",
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    network: bool = False,
    device: str | None = None,
    leave_on_cpu: bool = False,
) -> Loaded:
    """Load a frozen causal language model in evaluation mode, and its tokenizer.

    Returns them as `Loaded`: `model, tokenizer = load_base(name)`. Raises BaseModelError for a base that is not there,
    is incomplete or is unsafe to load.

    `dtype` (auto, float32, bfloat16 or float16) and `quantization` (none, int8, int4 or nf4) override the config's.
    `network` allows a hub id to be fetched. `leave_on_cpu`: what the device wants, but not yet there (it may hold only
    a part: `graftlm/distributed.py`).
    """
    base = base_config(base)
    where = locate(base, network=network)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = tokenizer_at(base, where, network=network)
    compute_dtype = resolve_dtype(dtype or base.dtype, device)
    quantization = checked_quantization(quantization or base.quantization)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            where,
            # What is to be quantized is read in bf16 and replaced layer by layer: it is never there in float32.
            dtype=torch.bfloat16 if quantization != "none" else compute_dtype,
            revision=base.revision,
            use_safetensors=True,
            local_files_only=not network,
            trust_remote_code=base.run_code_shipped_with_the_model,
        )
    except Exception as error:
        hints = hub_hint(base, network) + _quantized_elsewhere_hint(where)
        raise BaseModelError(
            f"{base.name}: cannot be loaded: {first_lines(error)}{hints}", code="unloadable-base"
        ) from None
    model.eval().requires_grad_(False).to("cpu" if leave_on_cpu else device)
    model.graft_base = BaseRecord(base.name, where if Path(where).is_dir() else None)
    if quantization != "none":
        quantize(model, quantization)
        return_freed_memory()
        cast_bfloat16(model, compute_dtype)
    return Loaded(model, tokenizer)


READERS = {
    "aqlm": "aqlm[gpu,cpu]",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "gptq": "optimum gptqmodel",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
}
"""quant_method of a folder that was quantized by another library -> the packages with which transformers 5 reads it."""


def _quantized_elsewhere_hint(where: str) -> str:
    """What to say of a folder whose weights another library quantized, and which transformers could not load."""
    config = Path(where) / "config.json"
    if not config.is_file():
        return ""
    settings = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    if not settings:
        return ""
    old = "bitsandbytes" if settings.get("load_in_8bit") or settings.get("load_in_4bit") else "an unknown method"
    method = settings.get("quant_method", old)
    needs = f"needs `pip install {READERS[method]}`" if method in READERS else "may need another package"
    return (
        f"\nIts weights were quantized by another library ({method}): reading them {needs}. Deltas sit on float "
        "weights and on weights that graftlm quantized: take the model that it was made of, with quantization nf4, "
        "int4 or int8"
    )
