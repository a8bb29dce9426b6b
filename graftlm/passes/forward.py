"""A packed forward pass through any causal language model: hidden states, then log-probabilities of the targets.

The model's own code runs, with two things of ours in it: attention per segment, through transformers' attention
interface, and the head for supervised positions only. `check_packing` proves on the model at hand that both are right.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftlm.errors import TrainingError
from graftlm.kernels.attention import SegmentLayout, use_layout
from graftlm.kernels.backend import probe
from graftlm.kernels.head import Comparison, Readings, head_log_probs, head_readings, linear_readings
from graftlm.model.hosts import LayerHost
from graftlm.model.modes import deltas_off
from graftlm.model.sites import decoder_of
from graftlm.passes.packed_attention import backend_of, is_packed
from graftlm.passes.recompute import computing_by


class Packed(Protocol):
    """The inputs of a forward pass over a pack (`data.batches.pack.Pack`, or anything with the same fields)."""

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
        out = require_decoder(model)(input_ids=pack.ids, position_ids=pack.positions, use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden[0]


def require_decoder(model: Any) -> Any:
    """The part of a model between ids and last hidden states; TrainingError where the model names none."""
    decoder = decoder_of(model)
    if decoder is None:
        raise TrainingError(
            f"{type(model).__name__} cannot be trained: neither its get_decoder() nor its base_model is the part "
            "between ids and last hidden states. Give the model a get_decoder() that returns this part",
            code="unsupported-model",
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
        with _giving(require_decoder(model), hidden):
            own = model(input_ids=ids, use_cache=False).logits[0]
        return layer(hidden).float(), own.float()

    try:
        with deltas_off(model):
            rows = rows / layer(rows).abs().max()
            plain, own = both(rows / 100)  # so small that no cap shows
            fitted_scale = float((plain * own).sum() / plain.square().sum())
            scales = {1.0, *numbers, *(1 / number for number in numbers)}
            scale = min(scales, key=lambda s: abs(s / fitted_scale - 1))
            scale = scale if abs(scale / fitted_scale - 1) <= 1e-4 + eps else fitted_scale
            plain, own = both(rows * (50 / abs(scale)))
    except Exception:
        return 1.0, None
    ways = {cap: scale * plain if cap is None else cap * torch.tanh(scale * plain / cap) for cap in (None, *numbers)}
    errors = {cap: float((found - own).abs().max() / own.abs().max()) for cap, found in ways.items()}
    cap = min(errors, key=lambda c: errors[c])
    return (scale, None) if errors[None] <= 4 * eps or errors[cap] > 4 * eps else (scale, cap)
