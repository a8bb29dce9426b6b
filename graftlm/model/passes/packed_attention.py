"""Attention of a packed row, as transformers' attention interface calls it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.errors import TrainingError
from graftlm.kernels.attention import LAYOUT, AttentionRule, SegmentLayout, tiled_attention
from graftlm.model.layers import prefix


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layout: SegmentLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment of a packed row and to the segments that it continues, to no other.

    The signature is that of transformers' attention interface, so any architecture that uses it can be packed:
    query [1, H, T, D], key and value [1, G, T, D] -> ([1, T, H, D], None). Without `layout`: that of `use_layout`.
    Weights have no dropout: the base is frozen and in evaluation mode. `s_aux` [H] are attention sinks: one more score
    of each head in the softmax, without a value. Position biases are not computed here: they are refused. Every segment
    also sees the keys and values that a prefix delta puts before it.
    """
    layout = layout or LAYOUT.get()
    if layout is None:
        raise TrainingError(
            f"{type(module).__name__}: inside packed_attention a model is called by log_probs or hidden_states, which "
            "know the segments of the pack. A recomputation of transformers' own (gradient_checkpointing_enable) does "
            "not: use graftlm.model.passes.recompute.recomputed_layers"
        )
    prefix.record(module, key, value)
    before = prefix.before(module, key)
    if unused.get("position_bias") is not None or (s_aux is not None and softcap is not None):
        raise NotImplementedError(f"{type(module).__name__}: packed attention with a position bias or capped sinks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if before is not None:
        key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
    if s_aux is not None:
        query, key, value = _with_sinks(query, key, value, s_aux, scale)
    rule = AttentionRule(layout, scale, sliding_window, softcap, key.shape[2] - query.shape[2])
    return (layout.attend or tiled_attention)(query[0], key[0], value[0], rule)[None], None


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with a key before all others whose score is the sink of each query head [H], and whose value is zero.

    The heads get dimensions for it: there the query is its sink and that key 1 / scale, all other keys are zero.
    """
    more = 8  # one is needed; devices want heads in eights
    of_heads = sinks.to(q.dtype)[None, :, None, None].expand(*q.shape[:3], 1)
    q = torch.cat([q, of_heads, q.new_zeros(*q.shape[:3], more - 1)], dim=3)
    first = F.pad(k.new_full((1, k.shape[1], 1, 1), 1 / scale), (k.shape[3], more - 1))
    k = torch.cat([first, F.pad(k, (0, more))], dim=2)
    return q, k, F.pad(v, (0, 0, 1, 0))
