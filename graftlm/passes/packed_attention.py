"""Attention, norms and gates of ours in a model of transformers, for the time of a pass over packed rows."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from graftlm.errors import TrainingError
from graftlm.kernels.attention import LAYOUT, AttentionRule, SegmentLayout, tiled_attention
from graftlm.kernels.backend import TORCH, Backend, probe
from graftlm.model import prefix
from graftlm.model.attention import attending_by
from graftlm.model.hosts import LayerHost
from graftlm.model.modes import deltas_off
from graftlm.passes.recompute import computing_by


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
            "not: use graftlm.passes.recompute.recomputed_layers",
            code="recomputation-loses-segments",
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


SEGMENTS = "graft_segments"
AttentionInterface.register(SEGMENTS, segment_attention)


@contextmanager
def packed_attention(model: Any, backend: Backend = TORCH) -> Iterator[None]:
    """Inside, the model attends by segments and needs a layout; outside, as it did before (generation, evaluation).

    Held over the backward pass too, where recomputation may run the forward pass again. `backend` computes attention,
    layers with low-rank factors, norms, gated units, rotary embeddings and the head: every layer, pack and model of a
    kind shares these, whatever deltas sit between them.
    """
    if is_packed(model):
        yield
        return
    hosts = [host for host in model.modules() if isinstance(host, LayerHost)]
    hosted = {id(host.base) for host in hosts}  # with a gain that is learnt
    faster = [(module, forward) for module, forward in faster_forwards(model) if id(module) not in hosted]
    for host in hosts:
        host.view.fused = backend.low_rank_linear
    rotary = [(file, file.apply_rotary_pos_emb) for file in _rotary_files(model)]
    for file, function in rotary:
        file.apply_rotary_pos_emb = backend.rotary(function)
    model.__dict__["graft_backend"] = backend
    try:
        computing = computing_by((module, partial(forward, module, backend)) for module, forward in faster)
        with attending_by(model, SEGMENTS), computing:
            yield
    finally:
        del model.__dict__["graft_backend"]
        for host in hosts:
            del host.view.fused
        for file, function in rotary:
            file.apply_rotary_pos_emb = function


def backend_of(model: Any) -> Backend:
    """The backend of the `packed_attention` that this model is in; outside of one, torch's operations."""
    backend = model.__dict__.get("graft_backend", TORCH)
    assert isinstance(backend, Backend)
    return backend


def _rotary_files(model: Any) -> list[Any]:
    """The modeling files with a function for rotary embeddings of their own, under the name that all of them use."""
    files = {type(module).__module__: sys.modules[type(module).__module__] for module in model.modules()}
    return [file for file in files.values() if hasattr(file, "apply_rotary_pos_emb")]


Forward = Callable[[Any, Backend, Tensor], Tensor]
"""What a module computes, by the operations of a backend: (module, backend, x) -> y."""


def faster_forwards(model: Any) -> list[tuple[Any, Forward]]:
    """The modules that compute what one of our operations computes, found by what they do: (module, forward).

    A module whose `forward` somebody else set keeps that one: it may move weights or count calls besides.
    """
    own = [module for module in model.modules() if "forward" not in vars(module)]
    unknown = [module for module in own if "graft_faster" not in vars(module)]
    if unknown:
        with deltas_off(model):
            for module in unknown:
                module.__dict__["graft_faster"] = _as_rms_norm(module) or _as_gated(module)
    found = ((module, module.__dict__["graft_faster"]) for module in own)
    return [(module, forward) for module, forward in found if forward is not None]


@torch.no_grad()
def _as_rms_norm(module: Any) -> Forward | None:
    """A root-mean-square norm in one pass for a module that computes it, with either of the two ways to store a gain.

    A candidate is asked for the norm of rows so small that eps matters. Whatever differs by more than rounding keeps
    its own code.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    # A norm that takes a gate too computes the same without one; ones that are no parameter fit rows of any width.
    if not _takes_one_tensor(module) or "weight" not in module._parameters:
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float) or weight.requires_grad:
        return None
    rows = probe(4, len(weight), weight) * eps**0.5
    for above_one in (False, True):
        forward = partial(_normed, above_one, eps)
        if _same(module, forward, rows):
            return forward
    return None


def _normed(above_one: bool, eps: float, module: Any, by: Backend, x: Tensor) -> Tensor:
    return by.rms_norm(x, 1 + module.weight if above_one else module.weight, eps)


@torch.no_grad()
def _as_gated(module: Any) -> Forward | None:
    """down(silu(gate(x)) * up(x)) for a feed-forward block that computes it, by its own layers and their deltas."""
    parts = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not all(isinstance(part, nn.Module) for part in parts) or not _takes_one_tensor(module):
        return None
    gate = module.gate_proj.base if isinstance(module.gate_proj, LayerHost) else module.gate_proj
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    rows = probe(4, weight.shape[-1], weight)
    try:  # gates up to 4: of small numbers silu and gelu are both the half
        rows = rows * (4 / module.gate_proj(rows).abs().max())
    except Exception:  # as in `_same`
        return None
    return _gated if _same(module, _gated, rows) else None


def _gated(module: Any, by: Backend, x: Tensor) -> Tensor:
    y: Tensor = module.down_proj(by.silu_gate(module.gate_proj(x), module.up_proj(x)))
    return y


def _takes_one_tensor(module: nn.Module) -> bool:
    return len(signature(module.forward).parameters) == 1


def _same(module: nn.Module, forward: Forward, rows: Tensor) -> bool:
    try:
        reference = module(rows)
        error = (forward(module, TORCH, rows).float() - reference.float()).abs().max() / reference.float().abs().max()
    except Exception:  # a module that takes no such rows is none of these
        return False
    return bool(error <= 4 * torch.finfo(rows.dtype).eps)


def is_packed(model: Any) -> bool:
    return bool(model.config._attn_implementation == SEGMENTS)
