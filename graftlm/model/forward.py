"""A packed forward pass through any causal language model: hidden states, then log-probabilities of the targets.

The model's own code runs, with two things of ours in it: attention per segment, through transformers' attention
interface, and the head for supervised positions only. `check_packing` proves on the model at hand that both are right.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from graftlm.errors import TrainingError
from graftlm.model.attach import deltas_off
from graftlm.model.backend import TORCH, Backend, probe
from graftlm.model.hosts import LayerHost
from graftlm.model.ops import (
    Comparison,
    Plan,
    Readings,
    head_log_probs,
    head_readings,
    linear_readings,
    segment_attention,
)

SEGMENTS = "graft_segments"
AttentionInterface.register(SEGMENTS, segment_attention)


@contextmanager
def packed_attention(model: Any, backend: Backend = TORCH) -> Iterator[None]:
    """Inside, the model attends by segments and needs a plan; outside, as it did before (generation, evaluation).

    Held over the backward pass too, where recomputation may run the forward pass again. `backend` computes attention,
    layers with low-rank factors, norms, gated units, rotary embeddings and the head: every layer, pack and model of a
    kind shares these, whatever deltas sit between them.
    """
    if is_packed(model):
        yield
        return
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    for config, _ in before:
        config._attn_implementation = SEGMENTS
    hosts = [host for host in model.modules() if isinstance(host, LayerHost)]
    hosted = {id(host.base) for host in hosts}  # with a gain that is learnt
    faster = [(module, forward) for module, forward in _faster(model) if id(module) not in hosted]
    for module, forward in faster:
        module.forward = partial(forward, backend)
    for host in hosts:
        host.view.fused = backend.low_rank_linear
    rotary = [(file, file.apply_rotary_pos_emb) for file in _rotary_files(model)]
    for file, function in rotary:
        file.apply_rotary_pos_emb = backend.rotary(function)
    model.__dict__["graft_backend"] = backend
    try:
        yield
    finally:
        del model.__dict__["graft_backend"]
        for config, implementation in before:
            config._attn_implementation = implementation
        for module, _ in faster:
            del module.forward
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
    """The modelling files with a function for rotary embeddings of their own, under the name that all of them use."""
    files = {type(module).__module__: sys.modules[type(module).__module__] for module in model.modules()}
    return [file for file in files.values() if hasattr(file, "apply_rotary_pos_emb")]


def _faster(model: Any) -> list[tuple[Any, Callable[[Backend, Tensor], Tensor]]]:
    """The modules that compute what one of our operations computes, found by what they do: (module, forward)."""
    unknown = [module for module in model.modules() if "graft_faster" not in module.__dict__]
    if unknown:
        with deltas_off(model):
            for module in unknown:
                module.__dict__["graft_faster"] = _as_rms_norm(module) or _as_gated(module)
    found = ((module, module.__dict__["graft_faster"]) for module in model.modules())
    return [(module, forward) for module, forward in found if forward is not None]


@torch.no_grad()
def _as_rms_norm(module: Any) -> Callable[[Backend, Tensor], Tensor] | None:
    """A root-mean-square norm in one pass for a module that computes it, with either of the two ways to store a gain.

    A candidate is asked for the norm of rows so small that eps matters. Whatever differs by more than rounding keeps
    its own code.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float) or weight.requires_grad:
        return None
    rows = probe(4, len(weight), weight) * eps**0.5
    for above_one in (False, True):
        forward = partial(_normed, module, above_one, eps)
        if _same(module, forward, rows):
            return forward
    return None


def _normed(module: Any, above_one: bool, eps: float, by: Backend, x: Tensor) -> Tensor:
    return by.rms_norm(x, 1 + module.weight if above_one else module.weight, eps)


@torch.no_grad()
def _as_gated(module: Any) -> Callable[[Backend, Tensor], Tensor] | None:
    """down(silu(gate(x)) * up(x)) for a feed-forward block that computes it, by its own layers and their deltas."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return None
    gate = module.gate_proj.base if isinstance(module.gate_proj, LayerHost) else module.gate_proj
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    forward = partial(_gated, module)
    return forward if _same(module, forward, probe(4, weight.shape[-1], weight)) else None


def _gated(module: Any, by: Backend, x: Tensor) -> Tensor:
    y: Tensor = module.down_proj(by.silu_gate(module.gate_proj(x), module.up_proj(x)))
    return y


def _same(module: nn.Module, forward: Callable[[Backend, Tensor], Tensor], rows: Tensor) -> bool:
    try:
        wanted = module(rows)
        error = (forward(TORCH, rows).float() - wanted.float()).abs().max() / wanted.float().abs().max()
    except (TypeError, RuntimeError, AttributeError):
        return False
    return bool(error <= 4 * torch.finfo(rows.dtype).eps)


class Packed(Protocol):
    """What a forward pass over a pack must be told (`data.pack.Pack`, or whatever has the same fields)."""

    @property
    def ids(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    @property
    def lengths(self) -> list[int]: ...

    @property
    def parents(self) -> list[int]: ...

    @property
    def hidden_rows(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...


def log_probs(model: Any, pack: Packed) -> Tensor:
    """log p(targets[i]) predicted from token `hidden_rows[i]`, in nats, float32 [S].

    ids and positions [1, T]; `lengths` of the segments, which sum to T, and the segment that each continues (-1 for
    none). A single segment needs no packed attention; several must be run inside `packed_attention(model)`.
    """
    return head(model, hidden_states(model, pack).index_select(0, pack.hidden_rows), pack.targets)


def hidden_states(model: Any, pack: Packed) -> Tensor:
    """The last hidden state of each token of a pack, as the head sees it: [T, d], in the model's dtype."""
    plan = {}
    if len(pack.lengths) > 1 or is_packed(model):
        plan["plan"] = Plan(pack.lengths, pack.parents, attend=backend_of(model).attention)
    backbone = model.get_decoder()
    hidden: Tensor = backbone(
        input_ids=pack.ids, position_ids=pack.positions, use_cache=False, **plan
    ).last_hidden_state
    return hidden[0]


def head(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p(targets), float32 [S], from the last hidden states [S, d], without a [S, vocabulary] tensor."""
    layer, scale, softcap = _head(model)
    if _is_linear(layer, scale):
        scaled = hidden if scale == 1 else hidden * scale
        return backend_of(model).head(scaled, layer.weight, layer.bias, targets, softcap)
    return head_log_probs(partial(logits, model), hidden, targets, model.config.get_text_config().vocab_size)


def head_read(
    model: Any, hidden: Tensor, targets: Tensor, comparisons: Sequence[Comparison] = (), *, with_means: bool = False
) -> Readings:
    """As `head`, and more of each distribution than the probability of its target."""
    layer, scale, softcap = _head(model)
    if _is_linear(layer, scale):
        scaled = hidden if scale == 1 else hidden * scale
        return linear_readings(scaled, layer.weight, layer.bias, targets, softcap, comparisons, with_means=with_means)
    size = model.config.get_text_config().vocab_size
    return head_readings(partial(logits, model), hidden, targets, size, comparisons, with_means=with_means)


def logits(model: Any, hidden: Tensor) -> Tensor:
    """What the head makes of last hidden states [n, d]: [n, vocabulary]."""
    layer, scale, softcap = _head(model)
    if _is_linear(layer, scale):  # the very products of `head`
        out: Tensor = layer(hidden if scale == 1 else hidden * scale)
    else:
        out = layer(hidden) * scale
    return out if softcap is None else softcap * torch.tanh(out / softcap)


def _head(model: Any) -> tuple[Any, float, float | None]:
    """(output layer, what its logits are multiplied with, the cap on them)"""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    # Cohere multiplies its logits, Granite divides them; whatever else a head does, `check_forward` finds out.
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return model.get_output_embeddings(), scale, softcap


def _is_linear(layer: Any, scale: float) -> bool:
    """Whether the head is one frozen product."""
    return type(layer) is nn.Linear and (scale == 1 or layer.bias is None)


def is_packed(model: Any) -> bool:
    return bool(model.config._attn_implementation == SEGMENTS)


PACKING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""Nats, for the mean difference of log-probabilities between two right ways to compute them: several times rounding."""


@dataclass(frozen=True)
class _Probe:
    """A row as `log_probs` takes it, alone or in a pack."""

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    parents: list[int]
    hidden_rows: Tensor
    targets: Tensor

    @classmethod
    def of(cls, row: Tensor, neighbour: Tensor | None = None, shared: int = 0) -> "_Probe":
        """A row, behind a neighbour if there is one; with `shared`, the row once more behind the same neighbour, now
        with their first `shared` tokens in common."""
        behind = [] if neighbour is None else [(neighbour, 0, -1)]
        segments, of_the_row = [*behind, (row, 0, -1)], [[len(behind)]]
        if shared:
            assert neighbour is not None
            root = len(segments)
            segments += [(row[:shared], 0, -1), (neighbour, shared, root), (row[shared:], shared, root)]
            of_the_row.append([root, root + 2])
        lengths = [len(ids) for ids, _, _ in segments]
        places = torch.arange(sum(lengths), device=row.device).split(lengths)
        return cls(
            ids=torch.cat([ids for ids, _, _ in segments])[None],
            positions=torch.cat([torch.arange(a, a + len(ids), device=row.device) for ids, a, _ in segments])[None],
            lengths=lengths,
            parents=[parent for _, _, parent in segments],
            hidden_rows=torch.cat([torch.cat([places[n] for n in parts])[:-1] for parts in of_the_row]),
            targets=row[1:].repeat(len(of_the_row)),
        )


@torch.no_grad()
def check_forward(model: Any, row: Tensor) -> None:
    """Prove on a row of ids, of two tokens at least, that `log_probs` says what the model itself says of it.

    This finds heads that do to their logits what `head` does not know. Raises TrainingError.
    """
    difference, tolerance = _difference(model, log_probs(model, _Probe.of(row)), _own_log_probs(model, row))
    if not difference <= tolerance:
        raise TrainingError(
            f"{type(model).__name__} cannot be trained: log-probabilities from its last hidden states and its output "
            f"layer differ from its own by {difference:.3g} nats a token (rounding is below {tolerance:g}). Its head "
            "does more than a product, a scale and soft-capping"
        )


@torch.no_grad()
def check_packing(
    model: Any, first: Tensor, second: Tensor, *, sharing: bool = False, backend: Backend = TORCH
) -> None:
    """Prove on two rows of ids that packing them is right; raise TrainingError with the remedy if it is not.

    The second row, of two tokens at least, must not change by one bit when the tokens of the first are replaced: this
    finds architectures that ignore the attention interface, and layers that carry a state from row to row. And it must
    be what the model's own forward pass makes of it alone, up to rounding: this finds wrong positions. With `sharing`,
    the same for two rows that have the first half of the second in common.
    """
    ways = {"packed": "data: {pack: false}` to run one row at a time"}
    if sharing:
        ways["packed with shared beginnings"] = "train: {prefix_sharing: false}` to compute the beginning of every row"
    name, vocabulary = type(model).__name__, model.config.get_text_config().vocab_size
    wanted, shared = _own_log_probs(model, second), len(second) // 2 if sharing else 0
    try:
        with packed_attention(model, backend):
            packed, after_another = (
                log_probs(model, _Probe.of(second, before, shared)).view(len(ways), -1)
                for before in (first, (first + 1) % vocabulary)
            )
    except (KeyError, TypeError, NotImplementedError) as error:
        # Shared beginnings cannot be the reason: the model's own code is told of them by nothing but positions, and
        # what segment_attention refuses it refuses whatever the segments continue.
        remedy = ways["packed"]
        raise TrainingError(f"{name} cannot be packed ({type(error).__name__}: {error}). Set `{remedy}") from None
    for (how, remedy), found, other in zip(ways.items(), packed, after_another, strict=True):
        if not torch.equal(found, other):
            leak = float((found - other).abs().max())
            raise TrainingError(
                f"{name} cannot be {how}: a row changes by {leak:.3g} nats with its neighbour. Set `{remedy}"
            )
        difference, tolerance = _difference(model, found, wanted)
        if not difference <= tolerance:
            raise TrainingError(
                f"{name} cannot be {how}: a row in a pack differs from the same row alone by {difference:.3g} nats a "
                f"token (rounding is below {tolerance:g}), so its positions are not the usual ones. Set `{remedy}"
            )


def _own_log_probs(model: Any, row: Tensor) -> Tensor:
    """What the model's own forward pass says of a row alone."""
    logits: Tensor = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, row[1:, None])[:, 0]


def _difference(model: Any, found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """How far log-probabilities are from the model's own, in nats a token, and how far rounding may take them."""
    return float((found - wanted).abs().mean()), PACKING_TOLERANCE.get(next(model.parameters()).dtype, 1e-3)
