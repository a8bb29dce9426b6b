"""A packed forward pass through any causal language model: hidden states, then log-probabilities of the targets.

The model's own code runs, with two things of ours in it: attention per segment, through transformers' attention
interface, and the head for supervised positions only. `check_packing` proves on the model at hand that both are right.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from graftlm.errors import TrainingError
from graftlm.kernels.attention import SegmentLayout, use_layout
from graftlm.kernels.backend import TORCH, Backend, probe
from graftlm.kernels.head import Comparison, Readings, head_log_probs, head_readings, linear_readings
from graftlm.model.layers.attach import deltas_off
from graftlm.model.layers.attention import attending_by
from graftlm.model.layers.hosts import LayerHost
from graftlm.model.layers.sites import decoder_of
from graftlm.model.passes.first_layers import first_layers_in_float32
from graftlm.model.passes.packed_attention import segment_attention
from graftlm.model.passes.recompute import computing_by

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
    faster = [(module, forward) for module, forward in _faster(model) if id(module) not in hosted]
    for host in hosts:
        host.view.fused = backend.low_rank_linear
    rotary = [(file, file.apply_rotary_pos_emb) for file in _rotary_files(model)]
    for file, function in rotary:
        file.apply_rotary_pos_emb = backend.rotary(function)
    model.__dict__["graft_backend"] = backend
    try:
        computing = computing_by((module, partial(forward, backend)) for module, forward in faster)
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
    """The modelling files with a function for rotary embeddings of their own, under the name that all of them use."""
    files = {type(module).__module__: sys.modules[type(module).__module__] for module in model.modules()}
    return [file for file in files.values() if hasattr(file, "apply_rotary_pos_emb")]


def _faster(model: Any) -> list[tuple[Any, Callable[[Backend, Tensor], Tensor]]]:
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
def _as_rms_norm(module: Any) -> Callable[[Backend, Tensor], Tensor] | None:
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
        forward = partial(_normed, module, above_one, eps)
        if _same(module, forward, rows):
            return forward
    return None


def _normed(module: Any, above_one: bool, eps: float, by: Backend, x: Tensor) -> Tensor:
    return by.rms_norm(x, 1 + module.weight if above_one else module.weight, eps)


@torch.no_grad()
def _as_gated(module: Any) -> Callable[[Backend, Tensor], Tensor] | None:
    """down(silu(gate(x)) * up(x)) for a feed-forward block that computes it, by its own layers and their deltas."""
    parts = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not all(isinstance(part, nn.Module) for part in parts) or not _takes_one_tensor(module):
        return None
    gate = module.gate_proj.base if isinstance(module.gate_proj, LayerHost) else module.gate_proj
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    forward, rows = partial(_gated, module), probe(4, weight.shape[-1], weight)
    try:  # gates up to 4: of small numbers silu and gelu are both the half
        rows = rows * (4 / module.gate_proj(rows).abs().max())
    except Exception:  # as in `_same`
        return None
    return forward if _same(module, forward, rows) else None


def _gated(module: Any, by: Backend, x: Tensor) -> Tensor:
    y: Tensor = module.down_proj(by.silu_gate(module.gate_proj(x), module.up_proj(x)))
    return y


def _takes_one_tensor(module: nn.Module) -> bool:
    return len(signature(module.forward).parameters) == 1


def _same(module: nn.Module, forward: Callable[[Backend, Tensor], Tensor], rows: Tensor) -> bool:
    try:
        wanted = module(rows)
        error = (forward(TORCH, rows).float() - wanted.float()).abs().max() / wanted.float().abs().max()
    except Exception:  # a module that takes no such rows is none of these
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
    layout = None
    if len(pack.lengths) > 1 or is_packed(model):
        layout = SegmentLayout(pack.lengths, pack.parents, attend=backend_of(model).attention)
    with use_layout(layout):
        out = _decoder(model)(input_ids=pack.ids, position_ids=pack.positions, use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden[0]


def _decoder(model: Any) -> Any:
    decoder = decoder_of(model)
    if decoder is None:
        raise TrainingError(
            f"{type(model).__name__} cannot be trained: neither its get_decoder() nor its base_model is the part "
            "between ids and last hidden states. Give the model a get_decoder() that returns this part"
        )
    return decoder


def head(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p(targets), float32 [S], from the last hidden states [S, d], without a [S, vocabulary] tensor."""
    layer, scale, softcap = _head(model)
    if _is_linear(layer, scale):
        return backend_of(model).head(_scaled(hidden, layer, scale), layer.weight, layer.bias, targets, softcap)
    return head_log_probs(partial(logits, model), hidden, targets, model.config.get_text_config().vocab_size)


def head_read(
    model: Any, hidden: Tensor, targets: Tensor, comparisons: Sequence[Comparison] = (), *, with_means: bool = False
) -> Readings:
    """As `head`, and more of each distribution than the probability of its target."""
    layer, scale, softcap = _head(model)
    if _is_linear(layer, scale):
        scaled = _scaled(hidden, layer, scale)
        return linear_readings(scaled, layer.weight, layer.bias, targets, softcap, comparisons, with_means=with_means)
    size = model.config.get_text_config().vocab_size
    return head_readings(partial(logits, model), hidden, targets, size, comparisons, with_means=with_means)


def logits(model: Any, hidden: Tensor) -> Tensor:
    """What the head makes of last hidden states [n, d]: [n, vocabulary]."""
    layer, scale, softcap = _head(model)
    if _is_linear(layer, scale):  # the very products of `head`
        out: Tensor = layer(_scaled(hidden, layer, scale))
    else:
        out = layer(hidden) * scale
    return out if softcap is None else softcap * torch.tanh(out / softcap)


def _is_linear(layer: Any, scale: float) -> bool:
    """Whether the head is one frozen product."""
    return type(layer) is nn.Linear and (scale == 1 or layer.bias is None)


def _scaled(hidden: Tensor, layer: nn.Linear, scale: float) -> Tensor:
    """What the output layer multiplies: scaled before it, and in its dtype (Mamba's hidden states are float32)."""
    hidden = hidden.to(layer.weight.dtype)
    return hidden if scale == 1 else hidden * scale


def _head(model: Any) -> tuple[Any, float, float | None]:
    """(output layer, what its logits are multiplied with, the cap on them)"""
    if "graft_head" not in model.__dict__:
        model.__dict__["graft_head"] = _scale_and_cap(model)
    return model.get_output_embeddings(), *model.__dict__["graft_head"]


class _LastHiddenStates(tuple[Tensor]):
    """What a decoder returns, as far as a head reads it: `last_hidden_state`, which is the first item too."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        """No cache, no router's logits, ..."""


@contextmanager
def _giving(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Inside, a call of the decoder returns these last hidden states [n, d] and does nothing, hooks on it included."""
    kinds: tuple[dict[int, Any], ...] = (decoder._forward_pre_hooks, decoder._forward_hooks)
    before = [dict(hooks) for hooks in kinds]
    for hooks in kinds:
        hooks.clear()
    try:
        with computing_by([(decoder, lambda *_, **__: _LastHiddenStates((hidden[None],)))]):
            yield
    finally:
        for hooks, all_of_them in zip(kinds, before, strict=True):
            hooks.update(all_of_them)


@torch.no_grad()
def _scale_and_cap(model: Any) -> tuple[float, float | None]:
    """What the model's own code does to the logits of its output layer, found by what comes out: some multiply by a
    number of the config and some divide, under many names, before the layer or after it; some cap them by a tanh.

    The decoder is left out: hidden states of ours take the place of its own. (1, None) where they do something else,
    which `check_forward` finds out.
    """
    layer, text = model.get_output_embeddings(), model.config.get_text_config()
    numbers = {
        float(n) for n in vars(text).values() if isinstance(n, int | float) and not isinstance(n, bool) and n > 0
    }
    like = getattr(layer.base if isinstance(layer, LayerHost) else layer, "weight", None)
    if not isinstance(like, Tensor) or like.dim() != 2:
        return 1.0, None
    rows, eps = probe(4, like.shape[1], like), torch.finfo(like.dtype).eps
    ids = torch.zeros(1, len(rows), dtype=torch.long, device=like.device)

    def both(hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(the layer's logits, the model's own)"""
        with _giving(_decoder(model), hidden):
            own = model(input_ids=ids, use_cache=False).logits[0]
        return layer(hidden).float(), own.float()

    try:
        with deltas_off(model):
            rows = rows / layer(rows).abs().max()
            plain, own = both(rows / 100)  # so small that no cap shows
            measured = float((plain * own).sum() / plain.square().sum())
            scales = {1.0, *numbers, *(1 / number for number in numbers)}
            scale = min(scales, key=lambda s: abs(s / measured - 1))
            scale = scale if abs(scale / measured - 1) <= 1e-4 + eps else measured
            plain, own = both(rows * (50 / abs(scale)))
    except Exception:
        return 1.0, None
    ways = {cap: scale * plain if cap is None else cap * torch.tanh(scale * plain / cap) for cap in (None, *numbers)}
    errors = {cap: float((found - own).abs().max() / own.abs().max()) for cap, found in ways.items()}
    cap = min(errors, key=lambda c: errors[c])
    return (scale, None) if errors[None] <= 4 * eps or errors[cap] > 4 * eps else (scale, cap)


def is_packed(model: Any) -> bool:
    return bool(model.config._attn_implementation == SEGMENTS)


# The proof ---------------------------------------------------------------------------------------------------------

PROBE_TOKENS = 32
"""The whole model is proved on the last so many tokens of a row: a head or a layer that does something of its own does
it to every token, and rounding does not grow with fewer (0.06 nats a token in bf16 for 16 tokens as for 128)."""

LONG_TOKENS = 2048
"""The first layers are proved on whole rows, up to so many of their last tokens: chunks, windows and sparse attention
begin somewhere."""

PACKING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""Nats, for the mean difference of log-probabilities between two right ways to compute them: several times rounding."""

FLOAT32_TOLERANCE = 1e-4
"""The same for hidden states after the first layers in float32, over their mean size."""


@dataclass(frozen=True)
class _Probe:
    """A row as `log_probs` takes it, alone or in a pack."""

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    parents: list[int]
    hidden_rows: Tensor
    targets: Tensor
    beside: Tensor
    """[T]: whether a token is one of the row's neighbours."""
    last: Tensor
    """[T]: whether it is the last one of the row, of which no other token of it knows."""

    @classmethod
    def of(cls, row: Tensor, neighbour: Tensor | None = None, shared: int = 0, *, start: int = 0) -> "_Probe":
        """A row, between a neighbour and the same once more, if there is one; with `shared`, the row a second time, now
        with its first `shared` tokens in common with a neighbour. The first segment begins at position `start`."""
        segments, of_the_row = [(row, start, -1)], [[0]]
        if neighbour is not None:
            segments, of_the_row = [(neighbour, start, -1), (row, 0, -1)], [[1]]
            if shared:
                root = len(segments)
                segments += [(row[:shared], 0, -1), (neighbour, shared, root), (row[shared:], shared, root)]
                of_the_row.append([root, root + 2])
            segments.append((neighbour, 0, -1))
        lengths = [len(ids) for ids, _, _ in segments]
        places = torch.arange(sum(lengths), device=row.device).split(lengths)
        own = [torch.cat([places[n] for n in parts]) for parts in of_the_row]
        beside = torch.ones(sum(lengths), dtype=torch.bool, device=row.device)
        beside[torch.cat(own)] = False
        last = torch.zeros_like(beside)
        last[torch.stack([part[-1] for part in own])] = True
        return cls(
            ids=torch.cat([ids for ids, _, _ in segments])[None],
            positions=torch.cat([torch.arange(a, a + len(ids), device=row.device) for ids, a, _ in segments])[None],
            lengths=lengths,
            parents=[parent for _, _, parent in segments],
            hidden_rows=torch.cat([part[:-1] for part in own]),
            targets=row[1:].repeat(len(of_the_row)),
            beside=beside,
            last=last,
        )

    def changed(self, tokens: Tensor, vocabulary: int) -> "_Probe":
        """The same with another id at each of these tokens [T]."""
        return replace(self, ids=torch.where(tokens, (self.ids + 1) % vocabulary, self.ids))


@contextmanager
def _not_a_number(model: Any, tokens: Tensor) -> Iterator[None]:
    """Inside, the embeddings of these tokens [T] of a pack are NaN: whatever takes in some of them, however little of
    it, becomes NaN too."""

    def spoil(layer: nn.Module, given: Any, out: Tensor) -> Tensor:
        return out.masked_fill(tokens[:, None], float("nan")) if out.shape[-2] == len(tokens) else out

    hook = model.get_input_embeddings().register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def check_forward(model: Any, row: Tensor) -> None:
    """Prove on a row of ids, of two tokens at least, that `log_probs` says what the model itself says of it.

    This finds heads that do to their logits what `head` does not know, and models that see what comes after a token.
    Raises TrainingError.
    """
    name = type(model).__name__
    seen: list[Tensor] = []
    hook = _decoder(model).register_forward_hook(lambda module, given, out: seen.append(out[0][0]))
    try:
        own = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise TrainingError(f"{name} cannot be trained: its own forward pass of a row fails ({what})") from error
    finally:
        hook.remove()
    wanted = _of_targets(own, row)
    if not wanted.isfinite().all():
        raise TrainingError(
            f"{name} cannot be trained: its own log-probabilities are not finite. Look at its weights and its dtype"
        )
    # Of the very same hidden states the head may differ by roundings of the logits, and by no more.
    of_the_head = 8 * torch.finfo(_dtype(model)).eps * max(1.0, float(own.abs().max()))
    try:
        both = head(model, seen[0][:-1], row[1:]), log_probs(model, _Probe.of(row))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise TrainingError(
            f"{name} cannot be trained: its output layer does not take its last hidden states, or its decoder not the "
            f"positions of tokens ({what})"
        ) from error
    for found, tolerance in zip(both, (of_the_head, PACKING_TOLERANCE.get(_dtype(model), 1e-3)), strict=True):
        difference = float((found - wanted).abs().mean())
        if not difference <= tolerance:
            raise TrainingError(
                f"{name} cannot be trained: log-probabilities from its last hidden states and its output layer differ "
                f"from its own by {difference:.3g} nats a token (rounding is below {tolerance:.2g}). Its head does "
                "more than a product, a scale and soft-capping"
            )
    with first_layers_in_float32(model) as decoder:
        before, after = (
            decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
            for ids in (row, torch.cat([row[:-1], (row[-1:] + 1) % _vocabulary(model)]))
        )
    if not _relative(after, before) <= FLOAT32_TOLERANCE:
        raise TrainingError(
            f"{name} cannot be trained to predict the next token: what it computes of a token changes with one that "
            "comes after it"
        )


@torch.no_grad()
def check_packing(
    model: Any,
    first: Tensor,
    second: Tensor,
    *,
    sharing: bool = False,
    longest: int | None = None,
    backend: Backend = TORCH,
) -> None:
    """Prove on two rows of ids that packing them is right; raise TrainingError with the remedy if it is not.

    The second row, of two tokens at least, must stay as it is when the tokens of the first are replaced and their
    embeddings are NaN, and all but its end when its last token is replaced: this finds architectures that ignore the
    attention interface, and layers that carry a state from row to row. And it must be what the model's own forward pass
    makes of it alone, up to rounding: this finds wrong positions. So must the first row, which lies behind it, and
    before it at the end of the `longest` row that will be packed (tokens; None: the longest that the model takes): this
    finds rotary embeddings that change with the longest row of a pack. With `sharing`, the same for two rows that have
    the first half of the second in common.

    The whole model is proved in its own dtype on the ends of the rows, and its first layers in float32 on all of them:
    these by torch's operations, so that another `backend` is proved on the whole model alone.
    """
    text = model.config.get_text_config()
    longest = max(_positions(model, first) if longest is None else longest, len(first), len(second))
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk is not None and longest > chunk:
        raise TrainingError(
            f"{type(model).__name__} cannot be packed: it attends in chunks of {chunk} tokens, and rows may have "
            f"{longest}. Set `data: {{pack: false}}` to run one row at a time, or make rows shorter"
        )
    short, row = first[-PROBE_TOKENS:], second[-PROBE_TOKENS:]
    in_nats = _Compared(
        alone=lambda row, start: _own_log_probs(model, row),
        read=lambda hidden, targets: head(model, hidden, targets),
        size=lambda wanted: 1.0,
        tolerance=PACKING_TOLERANCE.get(_dtype(model), 1e-3),
        unit="nats",
    )
    _prove(model, in_nats, short, row, longest - len(short), sharing, backend, spoiled=True)
    if backend is not TORCH:
        return
    with first_layers_in_float32(model) as decoder:
        in_float32 = _Compared(
            alone=lambda row, start: (
                hidden_states(model, _Probe.of(row, start=start))
                if start
                else decoder(input_ids=row[None], use_cache=False).last_hidden_state[0]
            )[:-1],
            read=lambda hidden, targets: hidden,
            size=lambda wanted: float(wanted.abs().mean()),
            tolerance=FLOAT32_TOLERANCE,
            unit="of its hidden states",
        )
        short, row = first[-LONG_TOKENS:], second[-LONG_TOKENS:]
        _prove(model, in_float32, short, row, longest - len(short), sharing, TORCH, spoiled=False)


def _positions(model: Any, row: Tensor) -> int:
    """How many positions the model has by its config; 0 where it says nothing, or does not take the last of them."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < PROBE_TOKENS:
        return 0
    try:
        hidden_states(model, _Probe.of(row[-PROBE_TOKENS:], start=limit - len(row[-PROBE_TOKENS:])))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a table of fewer positions; whatever else it is, the proof meets it again and says it
        return 0
    return limit


@dataclass(frozen=True)
class _Compared:
    """What two computations of a row are compared by."""

    alone: Callable[[Tensor, int], Tensor]
    """A row and the position of its first token -> what the model's own code makes of it."""
    read: Callable[[Tensor, Tensor], Tensor]
    """Last hidden states [n, d] and the ids that follow [n] -> the same of our pass."""
    size: Callable[[Tensor], float]
    """What differences are divided by."""
    tolerance: float
    unit: str


def _prove(
    model: Any,
    by: _Compared,
    first: Tensor,
    second: Tensor,
    start: int,
    sharing: bool,
    backend: Backend,
    *,
    spoiled: bool,
) -> None:
    """The second row in a pack against the row alone; then, `spoiled`, against the row beside NaN, or its neighbours
    against the same alone."""
    ways = {"packed": "data: {pack: false}` to run one row at a time"}
    if sharing:
        ways["packed with shared beginnings"] = "train: {prefix_sharing: false}` to compute the beginning of every row"
    name, shared = type(model).__name__, len(second) // 2 if sharing else 0
    try:
        wanted = by.alone(second, 0)
        of_first = [] if spoiled else [by.alone(first, start), by.alone(first, 0)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        what, tokens = f"{type(error).__name__}: {error}", max(start + len(first), len(second))
        raise TrainingError(
            f"{name} cannot be trained on rows of {tokens} tokens: its decoder fails on one ({what})"
        ) from error
    pack = _Probe.of(second, first, shared, start=start)
    try:
        with packed_attention(model, backend):
            hidden = hidden_states(model, pack)
            found = beside_nan = by.read(hidden[pack.hidden_rows], pack.targets)
            if spoiled:
                other = pack.changed(pack.beside | pack.last, _vocabulary(model))
                with _not_a_number(model, pack.beside):
                    beside_nan = by.read(hidden_states(model, other)[pack.hidden_rows], pack.targets)
    except (torch.OutOfMemoryError, TrainingError):
        raise
    except Exception as error:
        # Shared beginnings cannot be the reason: the model's own code is told of them by nothing but positions, and
        # what segment_attention refuses it refuses whatever the segments continue.
        remedy = ways["packed"]
        raise TrainingError(f"{name} cannot be packed ({type(error).__name__}: {error}). Set `{remedy}") from error
    size = by.size(wanted)
    ends = [hidden[: len(first) - 1], hidden[len(hidden) - len(first) : -1]] if len(first) > 1 else []
    neighbors = [(by.read(end, first[1:]), alone) for end, alone in zip(ends, of_first, strict=False)]
    each = (t.view(len(ways), *wanted.shape) for t in (found, beside_nan))
    for (how, remedy), packed, other_packed in zip(ways.items(), *each, strict=True):
        if not float((packed - other_packed).abs().mean()) / size <= by.tolerance:
            raise TrainingError(f"{name} cannot be {how}: {_leak(model, by, pack, found, backend)}. Set `{remedy}")
        for part, alone in ((packed, wanted), *neighbors):
            difference = float((part - alone).abs().mean()) / size
            if not difference <= by.tolerance:
                why = _why(model, by, first, second, start, wanted) if how == "packed" else ""
                raise TrainingError(
                    f"{name} cannot be {how}: a row in a pack differs from the same row alone by {difference:.3g} "
                    f"{by.unit} a token (rounding is below {by.tolerance:g}){why}. Set `{remedy}"
                )


def _leak(model: Any, by: _Compared, clean: _Probe, found: Tensor, backend: Backend) -> str:
    """What a row takes in that it should not: by how much it changes with each, in finite numbers."""
    changes = []
    for tokens in (clean.beside, clean.last):
        with packed_attention(model, backend):
            hidden = hidden_states(model, clean.changed(tokens, _vocabulary(model)))[clean.hidden_rows]
            changes.append(float((by.read(hidden, clean.targets) - found).abs().mean()) / by.size(found))
    of_neighbor, of_the_end = changes
    if of_the_end > of_neighbor:
        return f"a token changes by {of_the_end:.3g} {by.unit} with one that comes after it in its row"
    if of_neighbor > 0:
        return f"a row changes by {of_neighbor:.3g} {by.unit} with its neighbour"
    return "a row takes in numbers of its neighbour (NaN in one row became NaN in the other)"


def _why(model: Any, by: _Compared, first: Tensor, second: Tensor, start: int, wanted: Tensor) -> str:
    """The reason of a difference, where one can be named: beside a neighbour of the same length, at the usual
    positions, the row is right."""
    usual = _Probe.of(second, (second + 1) % _vocabulary(model))
    with packed_attention(model):
        found = by.read(hidden_states(model, usual)[usual.hidden_rows], usual.targets)
    if float((found - wanted).abs().mean()) / by.size(wanted) <= by.tolerance:
        longest = max(start + len(first), len(second))
        return (
            f" where a row of {longest} tokens lies in the pack: positions count otherwise in packs with long rows "
            "(longrope, dynamic)"
        )
    return ", so its positions are not the usual ones"


def _own_log_probs(model: Any, row: Tensor) -> Tensor:
    """What the model's own forward pass says of a row alone."""
    return _of_targets(model(input_ids=row[None], use_cache=False).logits[0, :-1].float(), row)


def _of_targets(logits: Tensor, row: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, row[1:, None])[:, 0]


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().mean() / wanted.abs().mean())


def _vocabulary(model: Any) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


def _dtype(model: Any) -> torch.dtype:
    """What the weights are in; biases and norms may be wider."""
    dtype: torch.dtype = next(model.parameters()).dtype
    return dtype
