"""Attention of the requests of a pass, each to its own cache: a function of transformers' attention interface.

The tokens of all requests lie end to end in one row, so every layer of the model multiplies them together; only here do
they part. A request attends to what stands in its cache before, to itself, and to no other request. T tokens of a pass;
H query heads, G key/value heads; L tokens of a request in this pass, S of them with those before, D of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from graftlm.kernels import cpu
from graftlm.kernels.attention import AttentionRule, SegmentLayout
from graftlm.kernels.decode import NewToken, attend_new, serves

NAME = "graft_requests"


class Cache:
    """Keys and values of one request, layer by layer in the order in which the model calls its attention."""

    def __init__(self, capacity: int, before: Tensor | None = None) -> None:
        """`capacity` tokens. `before` [layers, 2, G, p, D]: keys and values that every token sees first."""
        self.before = before
        self.always = 0 if before is None else before.shape[3]
        self.capacity = capacity + self.always
        self.layers: list[tuple[Tensor, Tensor]] = []

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) [G, capacity, D] of a layer; `key` and `value` [1, G, T, D] are like what comes in."""
        if number == len(self.layers):
            new = tuple(like.new_empty(like.shape[1], self.capacity, like.shape[3]) for like in (key, value))
            if self.before is not None:
                for tensor, learnt in zip(new, self.before[number], strict=True):
                    tensor[:, : self.always] = learnt
            self.layers.append((new[0], new[1]))
        return self.layers[number]

    def copy_from(self, other: "Cache", tokens: int) -> None:
        """Take over the first tokens of another request, whose beginning is the same."""
        stop = self.always + tokens
        for number, (keys, values) in enumerate(other.layers):
            own = self.layer(number, keys[None], values[None])
            for mine, theirs in zip(own, (keys, values), strict=True):
                mine[:, :stop] = theirs[:, :stop]


@dataclass
class Part:
    """The tokens of a request in a pass: `count` of them, after `start` that its cache holds."""

    cache: Cache
    start: int
    count: int


@dataclass
class Pass:
    """One pass over the tokens of several requests, end to end in the order of `parts`."""

    parts: list[Part]
    layer: int = 0
    """The attention layer that is called next."""
    masks: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict)
    layouts: dict[int, SegmentLayout] = field(default_factory=dict)

    def layout(self, tokens: int) -> SegmentLayout:
        """One prompt, as the kernels of training take it."""
        return self.layouts.setdefault(tokens, SegmentLayout([tokens]))

    def mask(self, L: int, S: int, always: int, window: int | None, like: Tensor) -> Tensor:
        """0 for what the last L of S tokens see and -inf for the rest [L, S]. Made once, used by every layer."""
        key = (L, S, always, window or 0)
        if key not in self.masks:
            distance = torch.arange(S - L, S, device=like.device)[:, None] - torch.arange(S, device=like.device)
            hidden = (distance < 0) | (distance >= (window or S + 1))
            hidden[:, :always] = False
            self.masks[key] = like.new_zeros(L, S).masked_fill_(hidden, float("-inf"))
        return self.masks[key]


@dataclass(frozen=True)
class Rule:
    """What a layer's attention is beside its inputs."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    """[G, H / G]: one more score of each head in the softmax, without a value."""

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


PASS: ContextVar[Pass | None] = ContextVar("graft_pass", default=None)


@contextmanager
def use_pass(requests: Pass) -> Iterator[None]:
    token = PASS.set(requests)
    try:
        yield
    finally:
        PASS.reset(token)


def attend_to_caches(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] -> ([1, T, H, D], None).

    `s_aux` [H] are attention sinks (`Rule.sinks`).
    """
    requests = PASS.get()
    if requests is None:
        raise RuntimeError(f"{type(module).__name__}: {NAME} is attention of a pass, and there is none")
    if unused.get("position_bias") is not None:
        raise NotImplementedError(f"{type(module).__name__}: a position bias")
    number, requests.layer = requests.layer, requests.layer + 1
    (_, H, T, D), G = query.shape, key.shape[1]
    scale = D**-0.5 if scaling is None else scaling
    rule = Rule(scale, sliding_window, softcap, None if s_aux is None else s_aux.view(G, H // G))
    out = query.new_empty(T, H, value.shape[3])
    by_kernel = rule.plain and serves(query, key, value)
    new: list[NewToken] = []
    stop = 0
    for part in requests.parts:
        start, stop = stop, stop + part.count
        keys, values = part.cache.layer(number, key, value)
        always = part.cache.always
        first = always + part.start
        length = first + part.count
        if by_kernel and part.count == 1:
            seen = max(always, length - (sliding_window or length))
            new.append(NewToken(start, keys, values, always, seen, length))
            continue
        keys[:, first:length], values[:, first:length] = key[0, :, start:stop], value[0, :, start:stop]
        out[start:stop] = attend(query[0, :, start:stop], keys[:, :length], values[:, :length], always, rule, requests)
    if new:
        attend_new(query, key, value, out, new, scale)
    return out[None], None


def attend(q: Tensor, k: Tensor, v: Tensor, always: int, rule: Rule, requests: Pass) -> Tensor:
    """Attention of the last L of S tokens, of which the first `always` are seen from everywhere: q [H, L, D], k and v
    [G, S, D] -> [L, H, D]."""
    (H, L, _), (G, S, _), window = q.shape, k.shape, rule.window
    if window is not None and window >= S - always:
        window = None
    mask = None if L == 1 and window is None else requests.mask(L, S, always, window, q)
    if not rule.plain:
        return _explicit(q, k, v, rule, mask)
    if L == 1:  # the heads that share keys are the rows of one product
        grouped = q.view(1, G, H // G, -1)
        return F.scaled_dot_product_attention(grouped, k[None], v[None], mask, scale=rule.scale).view(1, H, -1)
    whole = S == L and window is None
    if whole and cpu.serves(q.device, q.dtype) and cpu.library_digest():
        return cpu.attention(q, k, v, AttentionRule(requests.layout(L), rule.scale, None, None, 0))
    out = F.scaled_dot_product_attention(
        q[None], k[None], v[None], None if whole else mask, is_causal=whole, scale=rule.scale, enable_gqa=H != G
    )
    return out[0].transpose(0, 1)


def _explicit(q: Tensor, k: Tensor, v: Tensor, rule: Rule, mask: Tensor | None) -> Tensor:
    """softmax(scale q k^T + mask) v with capped scores, sinks, or both."""
    (H, L, D), G = q.shape, k.shape[0]
    scores = (q.reshape(G, -1, D) @ k.transpose(1, 2)).float().view(G, H // G, L, -1) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is not None:
        scores = scores + mask
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.float()[:, :, None, None].expand(G, H // G, L, 1)], dim=3)
    probabilities = scores.softmax(-1)[..., : k.shape[1]].to(v.dtype)
    return (probabilities.reshape(G, -1, k.shape[1]) @ v).view(H, L, -1).transpose(0, 1)


def _no_mask(*_: Any, **__: Any) -> None:
    """Who sees whom is known here: transformers makes no mask."""


AttentionInterface.register(NAME, attend_to_caches)
AttentionMaskInterface.register(NAME, _no_mask)
