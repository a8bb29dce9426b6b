"""Keys and values before every sequence: what prefix and prompt tuning are, seen from attention.

`attention` stands in transformers' table of attention kernels. Where a `ModelHost` has something to put before the
sequence it does so, and is otherwise the model's own kernel. Nothing enters the model's cache, so generation, packing
and recomputation need no special case.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "graft_prefix"


@dataclass(frozen=True)
class Before:
    """Keys and values [layers, 2, G, p, D] before a sequence: learnt ones, and then those of a prompt."""

    prefix: Tensor | None = None
    prompt: Tensor | None = None

    @property
    def length(self) -> int:
        return sum(part.shape[3] for part in (self.prefix, self.prompt) if part is not None)

    def whole(self) -> Tensor:
        parts = [part for part in (self.prefix, self.prompt) if part is not None]
        return torch.cat([part.to(parts[-1].dtype) for part in parts], dim=3)


@dataclass(frozen=True)
class Stacked:
    """Before the rows of a batch: [layers, 2, rows or 1, G, p, D], and which of it is there [rows or 1, p]."""

    keys_values: Tensor
    there: Tensor


def stack(rows: list[Before]) -> Stacked | None:
    """One tensor for rows of several lengths, shorter ones filled up with what nothing sees; None if all empty."""
    longest = max(row.length for row in rows)
    if longest == 0:
        return None
    like = next(row.whole() for row in rows if row.length)
    filled = []
    for row in rows:
        tensor = row.whole() if row.length else like[:, :, :, :0]
        missing = longest - row.length
        filled.append(torch.cat([tensor, tensor.new_zeros(*tensor.shape[:3], missing, tensor.shape[4])], dim=3))
    lengths = torch.tensor([row.length for row in rows], device=like.device)
    return Stacked(torch.stack(filled, dim=2), torch.arange(longest, device=like.device)[None] < lengths[:, None])


def before(module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """(keys, values [rows or 1, G, p, D], there [rows or 1, p]) for one attention layer, or None."""
    host = module.__dict__.get("graft_before")
    batch_prefix = None if host is None else host.before
    if batch_prefix is None:
        return None
    keys, values = batch_prefix.keys_values[module.layer_idx].to(like.dtype)
    return keys, values, batch_prefix.there


@contextmanager
def recording(decoder: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, every attention layer appends its own keys and values to the list; nothing is recomputed later.

    (A recomputation in the backward pass would find what stands before the rows by then.)
    """
    key_values: list[tuple[Tensor, Tensor]] = []
    layers = attention_layers(decoder)
    recomputing: list[Any] = [
        module for module in decoder.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    for module in recomputing:
        module.gradient_checkpointing = False
    for layer in layers:
        layer.__dict__["graft_heard"] = key_values
    try:
        yield key_values
    finally:
        for layer in layers:
            del layer.__dict__["graft_heard"]
        for module in recomputing:
            module.gradient_checkpointing = True


def is_recording(layer: nn.Module) -> bool:
    """Whether some attention layer inside of it keeps its keys and values at present."""
    return any("graft_heard" in module.__dict__ for module in layer.modules())


def record(module: nn.Module, key: Tensor, value: Tensor) -> None:
    key_values = module.__dict__.get("graft_heard")
    if key_values is not None:
        key_values.append((key, value))


def attention_layers(decoder: nn.Module) -> list[Any]:
    return [module for module in decoder.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [b, H, L, D], key and value [b, G, S, D] -> ([b, L, H, D], None)."""
    record(module, key, value)
    found = before(module, key)
    if found is None:
        plain: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **settings
        )
        return plain
    keys, values, there = found
    rows, L, S = query.shape[0], query.shape[2], key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(L, S, dtype=torch.bool, device=query.device).tril(S - L)[None, None]
    if attention_mask.dtype != torch.bool:
        attention_mask = attention_mask == 0
    mask = attention_mask[..., :S].expand(rows, 1, L, S)
    mask = torch.cat([there[:, None, None, :].expand(rows, 1, L, -1), mask], dim=-1)
    key = torch.cat([keys.expand(rows, *keys.shape[1:]), key], dim=2)
    value = torch.cat([values.expand(rows, *values.shape[1:]), value], dim=2)
    with_prefix: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, mask, **settings)
    return with_prefix


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
