"""Dtypes of a base: by name, and the one that `auto` means on a device."""

import torch
from torch import nn

from graftlm.config.dtypes import SHORT, long_dtype
from graftlm.errors import BaseModelError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of this name; auto is bfloat16 where the device multiplies it fast, and float32 elsewhere.

    Raises BaseModelError for an unknown name.
    """
    name = long_dtype(name)
    if name == "auto":
        return torch.bfloat16 if multiplies_bf16_fast(device) else torch.float32
    if name not in DTYPES:
        raise BaseModelError(
            f"dtype: {name!r} is unknown. {nearest(name, ('auto', *DTYPES, *SHORT))}", code="unknown-dtype"
        )
    return DTYPES[name]


def multiplies_bf16_fast(device: str) -> bool:
    """Whether the device has instructions for bf16 products (AVX512-BF16, AMX, tensor cores)."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def dtype_name(model: nn.Module) -> str:
    """torch's name of the dtype of a base: of what is not quantized."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")
