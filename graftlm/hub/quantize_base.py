"""A base whose linear layers are quantized, in place; it stays the base that it is."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftlm.config.dtypes import QUANTIZATIONS
from graftlm.errors import BaseModelError, TargetError, nearest
from graftlm.hub.fingerprint import base_record, digest_of, fingerprint
from graftlm.model.attach import absent_weights
from graftlm.model.bases import view
from graftlm.model.coverage import coverage
from graftlm.model.quantize import CODECS, QuantizedLinear
from graftlm.model.registry import attachment
from graftlm.model.sites import output_head

logger = logging.getLogger(__name__)


def checked_quantization(name: str) -> str:
    """The name, of `CODECS` or none; BaseModelError for another."""
    if name not in QUANTIZATIONS:
        raise BaseModelError(
            f"quantization: {name!r} is unknown. {nearest(name, QUANTIZATIONS)}", code="unknown-quantization"
        )
    return name


def quantize(model: nn.Module, quantization: str) -> nn.Module:
    """Replace every linear layer of a base but the output head by a quantized one (`int8`, `nf4` or `int4`), in place.

    The fingerprint is taken before: the base stays the base that it is. Where a model keeps its experts fused in one
    tensor, which is no linear layer and stays as it is, a logged warning says what share of the weights is quantized.
    Returns the model. Raises BaseModelError for an unknown `quantization`, and for a model with deltas on it.
    """
    quantize_layers(model, quantization)
    if (found := coverage(model)).experts:
        logger.warning(found.about_quantization())
    return model


def quantize_layers(model: nn.Module, quantization: str) -> nn.Module:
    """`quantize` without its warning."""
    if quantization not in CODECS:
        raise BaseModelError(
            f"quantization: {quantization!r} is unknown. {nearest(quantization, CODECS)}", code="unknown-quantization"
        )
    if attachment(model).configs:
        raise BaseModelError(
            "there are deltas on this model: quantize the base before they are attached", code="deltas-on-base"
        )
    if why := absent_weights(model):
        raise BaseModelError(why, code="weights-not-in-memory")
    known, folder, head = fingerprint(model).tensors, base_record(model).folder, output_head(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head and view(m)]
    for name in linear:
        parent, _, attribute = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        transposed = isinstance(layer, Conv1D)
        key = f"{name}.weight"
        quantized = QuantizedLinear(
            layer.weight.T if transposed else layer.weight,
            layer.bias,
            CODECS[quantization],
            transposed=transposed,
            original=None if folder is None else partial(_read_original, folder, key, known.get(key), transposed),
        )
        setattr(model.get_submodule(parent), attribute, quantized.train(layer.training))
    return model


def _read_original(folder: str, key: str, digest: str | None, transposed: bool) -> torch.Tensor:
    """One weight [d_out, d_in] from a base's files, and nothing else of them; TargetError if it is not there.

    Files may name it without what the class puts in front ("transformer."); the fingerprint says if it is the one.
    """
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            names = set(handle.keys())
            for name in (key, key.partition(".")[2]):
                found: torch.Tensor | None = handle.get_tensor(name) if name in names else None
                if found is not None and digest_of(found) == digest:
                    return found.T if transposed else found
    raise TargetError(
        f"{key} as it was before quantizing is not in the files of {folder}: were they moved or changed?",
        code="original-weight-missing",
    )


def cast_bfloat16(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a quantized base has in bfloat16, and the products of its quantized layers, to `dtype`, in place.

    Buffers in float32 stay so, as when a model is loaded in `dtype`: they are its frequencies of positions.
    """
    if dtype != torch.bfloat16:
        model._apply(lambda tensor: tensor.to(dtype) if tensor.dtype == torch.bfloat16 else tensor)


def quantization_of(model: nn.Module) -> str:
    """The quantization of a base's linear layers: int8, int4, nf4 or none."""
    layers = (m for m in model.modules() if isinstance(m, QuantizedLinear))
    return next((layer.codec.name for layer in layers), "none")
