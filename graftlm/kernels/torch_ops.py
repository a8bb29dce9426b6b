"""Hand-written autograd: the operations that nearly all of a training step's time and memory goes into.

Each is the fast form of a plain equation that stands in its docstring, and is tested against it, gradients included.

T tokens of a pack, S supervised positions (in attention: keys), V vocabulary, r rank; H query heads, G key/value
heads, L a segment, D head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from graftlm.errors import TrainingError
from graftlm.model.layers import prefix

# A frozen linear layer with low-rank factors on it ---------------------------------------------------------------


Frozen = Tensor | Callable[[torch.dtype], Tensor]
"""W [d_out, d_in] itself, or what makes it anew in a given dtype, for a layer that stores something smaller."""


def _made(W: Frozen, x: Tensor) -> Tensor:
    return W if isinstance(W, Tensor) else W(x.dtype)


def _rounded_once(x: Tensor, u: Tensor, W: Tensor, B: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + u B^T + b, where in half precision the sum is rounded and not its parts.

    What a young delta adds is smaller than the rounding of x W^T: added to what was rounded, most of it is lost, and
    training begins slower than in float32 (docs/decisions/042). A sum inside one product costs copies of x and W.
    """
    if x.dtype == torch.float32:
        return F.linear(x, W, b).addmm_(u, B.T)
    return F.linear(torch.cat([x, u], 1), torch.cat([W, B], 1), b)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of rows [T, d_in] -> [T, d_out] on x [.. d_in].

    Models edit the outputs of layers in place (OLMo's `clamp_`). autograd allows that for the view that is made here,
    and not for one that is made inside of a Function.
    """
    y = function(x.reshape(-1, x.shape[-1]))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


class _LowRankLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, W: Frozen, b: Tensor | None, A: Tensor, B: Tensor, gain: Tensor | None
    ) -> Tensor:
        ctx.weight = W
        W = _made(W, rows)
        A_, B_ = A.to(rows.dtype), B.to(rows.dtype)
        inner = (A_ @ rows.T).T  # the few rows of the small factor first: a quarter less time than rows A^T
        z = _rounded_once(rows, inner, W, B_, b if gain is None else None)
        kept = rows if ctx.needs_input_grad[3] else None  # x is for the gradient of A alone
        ctx.save_for_backward(kept, A_, B_, inner, gain, None if gain is None else z)
        # 1 + (g - 1), so that a gain close to 1 keeps its digits where products run in half precision
        y = z if gain is None else torch.addcmul(z, z, (gain - 1).to(rows.dtype))
        if gain is not None and b is not None:
            y += b
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, A_, B_, inner, gain, z = ctx.saved_tensors
        grad_gain = None
        if gain is not None:
            grad_gain = (grad * z).sum(0, dtype=torch.float32)
            grad = torch.addcmul(grad, grad, (gain - 1).to(grad.dtype))
        grad_inner = (B_.T @ grad.T).T
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _made(ctx.weight, grad)).addmm_(grad_inner, A_)
        grad_A = (grad_inner.T @ rows).float() if ctx.needs_input_grad[3] else None
        # not grad^T inner: with the few rows first, as above, this is up to three times faster
        grad_B = (inner.T @ grad).T.float() if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_A, grad_B, grad_gain


def low_rank_linear(x: Tensor, W: Frozen, b: Tensor | None, A: Tensor, B: Tensor, gain: Tensor | None = None) -> Tensor:
    """gain * (x W^T + (x A^T) B^T) + b for frozen W and b: x [.. d_in], W [d_out, d_in], A [r, d_in], B [d_out, r].

    No gradient for W, no cast of W, and nothing saved but x (where A learns), x A^T and, with a gain [d_out], what it
    multiplies. A W that is made is made again in the backward pass. A, B and the gain stay float32 outside, the
    products run in the dtype of x.
    """
    if torch.is_autocast_enabled(x.device.type):  # as F.linear would: in the dtype asked for, forward and backward
        dtype = torch.get_autocast_dtype(x.device.type)
        x, b = x.to(dtype), None if b is None else b.to(dtype)
        W = W.to(dtype) if isinstance(W, Tensor) else W
        with torch.autocast(x.device.type, enabled=False):
            return by_rows(lambda rows: _LowRankLinear.apply(rows, W, b, A, B, gain), x)
    return by_rows(lambda rows: _LowRankLinear.apply(rows, W, b, A, B, gain), x)


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, W: Frozen, b: Tensor | None) -> Tensor:
        ctx.weight = W
        return F.linear(rows, _made(W, rows), b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ _made(ctx.weight, grad), None, None


def frozen_linear(x: Tensor, W: Frozen, b: Tensor | None) -> Tensor:
    """x W^T + b for frozen W and b: x [.. d_in], W [d_out, d_in]. Saves nothing; a W that is made is made again."""
    return by_rows(lambda rows: _FrozenLinear.apply(rows, W, b), x)


# Element-wise work, in pieces that stay in the processor's cache -------------------------------------------------

ELEMENTS_AT_ONCE = 2**18
"""Elements of a piece, for each thread: what one operation writes there the next one still finds in the cache."""


def _pieces(x: Tensor) -> list[slice]:
    """Slices over the rows of x [rows, d]; all at once for a compiler, and on a device that hides latencies itself."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    return _slices(len(x), ELEMENTS_AT_ONCE * torch.get_num_threads() // x.shape[-1])


class _SiluGate(Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, ups: Tensor) -> Tensor:
        y = torch.empty_like(ups)
        for piece in _pieces(gates):
            torch.mul(F.silu(gates[piece]), ups[piece], out=y[piece])
        ctx.save_for_backward(gates, ups)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, Tensor]:
        gates, ups = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gates), torch.empty_like(ups)
        for piece in _pieces(gates):
            scratch = F.silu(gates[piece])
            torch.mul(grads[piece], scratch, out=grad_up[piece])
            torch.mul(grads[piece], ups[piece], out=scratch)
            torch.ops.aten.silu_backward(scratch, gates[piece], grad_input=grad_gate[piece])
        return grad_gate, grad_up


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, keeping its two inputs only."""
    return by_rows(lambda gates: _SiluGate.apply(gates, up.reshape(gates.shape)), gate)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension, for a gain [d]: torch's own, which keeps x and one
    number a row, where a norm that is written out keeps several float32 copies of x and walks over them again."""
    return F.rms_norm(x, gain.shape, gain, eps)


def by_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """The rotary embedding of most models: q and k [.. D] turned, dimension n with n + D / 2; cos and sin [rows, T, D].

    For a compiler, which makes separate passes over memory of the concatenation that modelling files have in its place.
    """
    (cos, cos_), (sin, sin_) = (t.unsqueeze(unsqueeze_dim).chunk(2, -1) for t in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.stack([a * cos - b * sin, b * cos_ + a * sin_], -2).flatten(-2).to(x.dtype)

    return turned(q), turned(k)


# Attention over the segments of a pack ---------------------------------------------------------------------------

QUERIES_AT_ONCE = 128
"""Queries of one product on a CPU. Less of it falls behind the causal mask than if a segment were one product."""

KEPT_KEYS = 256
"""Probabilities over so many keys are kept for the backward pass; those over more are computed again."""


class Tile(NamedTuple):
    """Queries a .. b of a pack, and the ranges of keys that they may see, in the order of their positions."""

    queries: slice
    keys: list[slice]

    @property
    def shape(self) -> tuple[int, int]:
        return self.queries.stop - self.queries.start, sum(k.stop - k.start for k in self.keys)


@dataclass
class Plan:
    """Where the segments of a packed row lie."""

    lengths: list[int]
    parents: list[int] | None = None
    """The segment that each one continues, -1 for none: it sees all those on the way there. None: no one continues."""
    masks: dict[tuple[int | None, ...], Tensor] = field(default_factory=dict)
    tiled: dict[tuple[int, int | None], list["Tile"]] = field(default_factory=dict)
    as_kernels_read: dict[int, Any] = field(default_factory=dict)
    """By `always`: the segments as `kernels.py` lays them out."""
    attend: "Callable[[Tensor, Tensor, Tensor, Rule], Tensor] | None" = None
    """What computes attention over these segments; None: `tiled_attention`."""

    def tiles(self, always: int, at_once: int | None) -> list[Tile]:
        """The queries of each segment in equal parts of about `at_once`, with the keys of the row up to there.

        `always` keys that every query sees stand before those of the pack. Made once, used by every layer.
        """
        key = (always, at_once)
        if key not in self.tiled:
            self.tiled[key] = self._tiles(always, at_once)
        return self.tiled[key]

    def _tiles(self, always: int, at_once: int | None) -> list[Tile]:
        found: list[Tile] = []
        paths: list[list[slice]] = []
        end = 0
        for length, parent in zip(self.lengths, self.parents or [-1] * len(self.lengths), strict=True):
            start, end = end, end + length
            before = paths[parent] if parent >= 0 else [slice(0, always)] if always else []
            paths.append([*before, slice(always + start, always + end)])
            parts = max(1, round(length / (at_once or length)))
            ends = [start + length * (n + 1) // parts for n in range(parts)]
            for a, b in zip([start, *ends], ends, strict=False):
                found.append(Tile(slice(a, b), [*before, slice(always + start, always + b)]))
        return found

    def mask(self, tile: Tile, always: int, window: int | None, like: Tensor) -> Tensor:
        """0 for what is seen and -inf for the rest, [L, S]: the queries stand at the last L of the tile's S keys.

        The first `always` keys are seen from everywhere; of the others, those not later than the query and less than
        `window` positions before it. Keys lie in the order of their positions, so distances are differences of
        indices. Made once for each shape, used by every layer.
        """
        L, S = tile.shape
        key = (L, S, always, window)
        if key not in self.masks:
            distance = torch.arange(S - L, S, device=like.device)[:, None] - torch.arange(S, device=like.device)
            hidden = (distance < 0) | (distance >= (window or S))
            hidden[:, :always] = False
            seen = torch.zeros(L, S, dtype=like.dtype, device=like.device)
            self.masks[key] = seen.masked_fill_(hidden, float("-inf"))
        return self.masks[key]


PLAN: ContextVar[Plan | None] = ContextVar("graft_plan", default=None)
"""The plan of the pack that a model computes at present. No argument of the model: not every architecture hands one on
to its attention."""


@contextmanager
def planned(plan: Plan | None) -> Iterator[None]:
    """Inside, `segment_attention` attends by this plan. What runs later (recomputation) must enter it again."""
    token = PLAN.set(plan)
    try:
        yield
    finally:
        PLAN.reset(token)


@contextmanager
def attending_by(model: Any, name: str) -> Iterator[None]:
    """Inside, the model attends by the function that transformers' AttentionInterface has under this name; outside, as
    it did before."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    for config, _ in before:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@dataclass(frozen=True)
class Rule:
    """What a layer's attention is beside its inputs."""

    plan: Plan
    scale: float
    window: int | None
    softcap: float | None
    always: int

    def mask(self, tile: Tile, like: Tensor) -> Tensor:
        window = self.window if self.window is not None and self.window < tile.shape[1] else None
        return self.plan.mask(tile, self.always, window, like)

    def probabilities(self, q_: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """softmax over S keys [G, H / G * L, S], and the tanh of soft-capped scores, for queries under each other."""
        L, S = mask.shape
        hidden = mask.expand(q_.shape[1] // L, L, S).reshape(-1, S)
        if self.softcap is None:
            return _softmax(torch.baddbmm(hidden, q_, k.transpose(1, 2), alpha=self.scale)), None
        bent = torch.bmm(q_, k.transpose(1, 2)).mul_(self.scale / self.softcap).tanh_()
        return _softmax((bent * self.softcap).add_(hidden)), bent


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension. torch takes 32 half-precision numbers at a time and the rest of a row one by one, at ten
    times the cost each: rows that are short go through float32, which costs less than such a rest."""
    if scores.element_size() == 2 and scores.shape[-1] <= KEPT_KEYS:
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    return scores.softmax(-1)


class _TiledAttention(Function):
    """softmax(scale q k^T + mask) v, tile by tile: q [H, T, D], k and v [G, always + T, D] -> [T, H, D].

    The H / G query heads that share a key head lie under each other in one product, so that k and v are not repeated
    and their gradients sum by themselves.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        (H, T, D), G = q.shape, k.shape[0]
        out = q.new_empty(T, H, v.shape[-1])
        kept: list[Tensor | None] = []
        for tile in rule.plan.tiles(rule.always, QUERIES_AT_ONCE):
            q_ = q[:, tile.queries].reshape(G, -1, D)
            probabilities, _ = rule.probabilities(q_, _at(k, tile.keys), rule.mask(tile, q))
            made = torch.bmm(probabilities, _at(v, tile.keys))
            out[tile.queries] = made.view(H, -1, v.shape[-1]).transpose(0, 1)
            kept.append(probabilities if tile.shape[1] <= KEPT_KEYS and rule.softcap is None else None)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.rule = rule
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        rule, (H, _, D), G = ctx.rule, q.shape, k.shape[0]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for tile, probabilities in zip(rule.plan.tiles(rule.always, QUERIES_AT_ONCE), kept, strict=True):
            q_, k_, v_ = q[:, tile.queries].reshape(G, -1, D), _at(k, tile.keys), _at(v, tile.keys)
            bent = None
            if probabilities is None:
                probabilities, bent = rule.probabilities(q_, k_, rule.mask(tile, q))
            grad_out = grad[tile.queries].transpose(0, 1).reshape(G, -1, v.shape[-1])
            grad_p = torch.bmm(grad_out, v_.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, probabilities, -1, q.dtype).mul_(rule.scale)
            if bent is not None:
                grad_scores.mul_(1 - bent.square())
            grad_q[:, tile.queries] = torch.bmm(grad_scores, k_).view(H, -1, D)
            _add_at(grad_k, tile.keys, torch.bmm(grad_scores.transpose(1, 2), q_))
            _add_at(grad_v, tile.keys, torch.bmm(probabilities.transpose(1, 2), grad_out))
        return grad_q, grad_k, grad_v, None


def _at(t: Tensor, ranges: list[slice]) -> Tensor:
    return t[:, ranges[0]] if len(ranges) == 1 else torch.cat([t[:, r] for r in ranges], dim=1)


def _add_at(t: Tensor, ranges: list[slice], values: Tensor) -> None:
    for r, part in zip(ranges, values.split([r.stop - r.start for r in ranges], dim=1), strict=True):
        t[:, r] += part


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Attention of the segments of a rule's plan: q [H, T, D], k and v [G, always + T, D] -> [T, H, D]."""
    if q.device.type != "cpu":
        return _stock_attention(q, k, v, rule)
    out: Tensor = _TiledAttention.apply(q, k, v, rule)
    return out


def _stock_attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """The same by torch's own kernels, a segment at a time: for devices where those are fast."""
    outputs = []
    for tile in rule.plan.tiles(rule.always, None):
        q_, k_, v_ = q[None, :, tile.queries], _at(k, tile.keys)[None], _at(v, tile.keys)[None]
        if rule.softcap is not None:
            k_, v_ = (t.repeat_interleave(q.shape[0] // t.shape[1], dim=1) for t in (k_, v_))
            scores = rule.softcap * torch.tanh((q_ @ k_.transpose(2, 3) * rule.scale).float() / rule.softcap)
            made = (scores + rule.mask(tile, q)).softmax(-1).to(v.dtype) @ v_
        else:
            whole = tile.shape[0] == tile.shape[1] and (rule.window is None or rule.window >= tile.shape[1])
            mask = None if whole else rule.mask(tile, q)
            made = F.scaled_dot_product_attention(
                q_, k_, v_, mask, is_causal=whole, scale=rule.scale, enable_gqa=q.shape[0] != k.shape[0]
            )
        outputs.append(made[0].transpose(0, 1))
    return torch.cat(outputs)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    plan: Plan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment of a packed row and to the segments that it continues, to no other.

    The signature is that of transformers' attention interface, so any architecture that uses it can be packed:
    query [1, H, T, D], key and value [1, G, T, D] -> ([1, T, H, D], None). `plan`: that of `planned`, if none is given.
    Weights have no dropout: the base is frozen and in evaluation mode. `s_aux` [H] are attention sinks: one more score
    of each head in the softmax, without a value. Position biases are not computed here: they are refused. Every segment
    also sees the keys and values that a prefix delta puts before it.
    """
    plan = plan or PLAN.get()
    if plan is None:
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
    rule = Rule(plan, scale, sliding_window, softcap, key.shape[2] - query.shape[2])
    return (plan.attend or tiled_attention)(query[0], key[0], value[0], rule)[None], None


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


# The output head and the loss ------------------------------------------------------------------------------------

LOGITS_AT_ONCE = 2**23
"""Elements of a chunk of logits: 16 MiB of bf16. The head's weight is read once a chunk, so it should not be small."""

SOFTMAX_AT_ONCE = 2**19
"""Elements that are exponentiated together, in float32: 2 MiB, which stays in the processor's cache."""


class _LinearLogProbs(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, W: Tensor, b: Tensor | None, targets: Tensor, softcap: float | None
    ) -> Tensor:
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        for rows in _slices(len(targets), LOGITS_AT_ONCE // W.shape[0]):
            logits = F.linear(hidden[rows], W, b)
            towards = W[targets[rows]]  # d log p(target) / d hidden = (onehot(target) - softmax) W
            for inner in _slices(len(logits), SOFTMAX_AT_ONCE // W.shape[0]):
                z, wanted, slope = logits[inner], targets[rows][inner, None], None
                if softcap is not None:
                    bent = z.float().div_(softcap).tanh_()
                    z, slope = bent * softcap, 1 - bent.square_()
                    towards[inner] *= slope.gather(1, wanted).to(towards.dtype)
                chunk = z.log_softmax(-1, dtype=torch.float32)
                log_probs[rows][inner] = chunk.gather(1, wanted)[:, 0]
                chunk.exp_()
                logits[inner] = chunk if slope is None else chunk.mul_(slope)
            torch.sub(towards, logits @ W, out=grad[rows])
        ctx.save_for_backward(grad)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_log_probs[:, None].to(grad.dtype), None, None, None, None


def _slices(count: int, size: int) -> list[slice]:
    """0 .. count in steps of `size`, at least 1."""
    return [slice(start, start + max(1, size)) for start in range(0, count, max(1, size))]


def linear_log_probs(
    hidden: Tensor, W: Tensor, b: Tensor | None, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """log softmax(z)[targets[i]] in nats, float32 [S], for a frozen head: z = W hidden[i] + b, W [V, d].

    With a softcap c the logits are c tanh(z / c). hidden [S, d] holds supervised positions only. Logits exist for one
    chunk of rows at a time, and the gradient of each log-probability for its row is computed while they do: the
    backward pass is one multiplication.
    """
    log_probs: Tensor = _LinearLogProbs.apply(hidden, W, b, targets, softcap)
    return log_probs


def head_log_probs(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """The same for a head that is any function, one with a delta on it: computed again in the backward pass."""

    def chunk(h: Tensor, t: Tensor) -> Tensor:
        return -F.cross_entropy(head(h).float(), t, reduction="none")

    step = max(1, LOGITS_AT_ONCE // vocabulary)
    parts = zip(hidden.split(step), targets.split(step), strict=True)
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False) for h, t in parts])


# More of a distribution than the probability of its target ---------------------------------------------------------


class Comparison(NamedTuple):
    """Other distributions at the same S positions, and how far the head's are from them."""

    logits: Callable[[slice], Tensor]
    """Some of the S positions -> the other's logits there [n, V], without a gradient; asked chunk by chunk."""
    distance: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """(the head's logits, the other's), float32 [n, V] -> (distances [n], their gradients for the first [n, V])."""


class Readings(NamedTuple):
    """What is read of the S distributions of a head with logits z: float32 [S] each, with gradients."""

    log_probs: Tensor
    """log softmax(z)[target], in nats."""
    normalisers: Tensor
    """log sum_v exp(z_v)"""
    distances: tuple[Tensor, ...]
    """One for each comparison."""
    means: Tensor | None
    """1/V sum_v z_v, where it is asked for."""


class _LinearReadings(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        W: Tensor,
        b: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        comparisons: Sequence[Comparison],
        with_means: bool,
    ) -> tuple[Tensor, ...]:
        (V, _), S, count = W.shape, len(targets), 1 + len(comparisons) + with_means
        log_probs, *readings = torch.empty(1 + count, S, device=hidden.device)
        towards, grads = torch.empty_like(hidden), [torch.empty_like(hidden) for _ in range(count)]
        for rows in _slices(S, LOGITS_AT_ONCE // V):
            logits = F.linear(hidden[rows], W, b)
            others = [comparison.logits(rows) for comparison in comparisons]
            slopes = [torch.empty_like(logits) for _ in range(count)]  # of each reading, for the logits
            towards[rows] = W[targets[rows]]
            for inner in _slices(len(logits), SOFTMAX_AT_ONCE // V):
                at = slice(rows.start + inner.start, min(rows.start + inner.stop, rows.stop))
                z, wanted, bend = logits[inner].float(), targets[at, None], None
                if softcap is not None:
                    bent = z.div(softcap).tanh_()
                    z, bend = bent * softcap, 1 - bent.square_()
                    towards[at] *= bend.gather(1, wanted).to(towards.dtype)
                log_softmax = z.log_softmax(-1)
                log_probs[at] = log_softmax.gather(1, wanted)[:, 0]
                made = [(z.gather(1, wanted)[:, 0] - log_probs[at], log_softmax.exp_())]
                made += [c.distance(z, o[inner].float()) for c, o in zip(comparisons, others, strict=True)]
                made += [(z.mean(-1), torch.full_like(z, 1 / V))] if with_means else []
                for reading, slope, (values, of_logits) in zip(readings, slopes, made, strict=True):
                    reading[at] = values
                    slope[inner] = of_logits if bend is None else of_logits * bend
            for grad, slope in zip(grads, slopes, strict=True):
                torch.mm(slope, W, out=grad[rows])
        ctx.save_for_backward(towards.sub_(grads[0]), *grads)  # d log p(target) = d z_target - d normaliser
        return log_probs, *readings

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by: Tensor) -> tuple[Tensor | None, ...]:
        grad, *more = (saved * each[:, None].to(saved.dtype) for saved, each in zip(ctx.saved_tensors, by, strict=True))
        for each in more:
            grad += each
        return grad, None, None, None, None, None, None


def linear_readings(
    hidden: Tensor,
    W: Tensor,
    b: Tensor | None,
    targets: Tensor,
    softcap: float | None = None,
    comparisons: Sequence[Comparison] = (),
    *,
    with_means: bool = False,
) -> Readings:
    """Readings of a frozen head, as `linear_log_probs` has its logits: chunk by chunk, gradients for the hidden states
    included, so that what the backward pass keeps is a few [S, d]."""
    made = _LinearReadings.apply(hidden, W, b, targets, softcap, comparisons, with_means)
    return _readings(made, with_means)


def _readings(made: Sequence[Tensor], with_means: bool) -> Readings:
    log_probs, normalisers, *distances = made
    means = distances.pop() if with_means else None
    return Readings(log_probs, normalisers, tuple(distances), means)


class _Distance(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, other: Tensor, distance: Any) -> Tensor:
        values: Tensor
        values, grad = distance(z, other)
        ctx.save_for_backward(grad)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * by[:, None], None, None


def head_readings(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    vocabulary: int,
    comparisons: Sequence[Comparison] = (),
    *,
    with_means: bool = False,
) -> Readings:
    """The same for a head that is any function, as `head_log_probs`."""

    def chunk(h: Tensor, t: Tensor, rows: slice) -> tuple[Tensor, ...]:
        z = head(h).float()
        made = [-F.cross_entropy(z, t, reduction="none"), z.logsumexp(-1)]
        made += [_Distance.apply(z, other.logits(rows).float(), other.distance) for other in comparisons]
        return (*made, z.mean(-1)) if with_means else tuple(made)

    parts = [
        checkpoint(chunk, hidden[rows], targets[rows], rows, use_reentrant=False)
        for rows in _slices(max(1, len(targets)), LOGITS_AT_ONCE // vocabulary)
    ]
    return _readings([torch.cat(same) for same in zip(*parts, strict=True)], with_means)
