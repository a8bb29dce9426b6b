"""Hand-written autograd: the three operations that nearly all of a training step's time and memory goes into.

Each is the fast form of a plain equation that stands in its docstring, and is tested against it, gradients included.

T tokens of a pack, S supervised positions, V vocabulary, r rank; H query heads, G key/value heads, L a segment, D head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# A frozen linear layer with low-rank factors on it ---------------------------------------------------------------


class _LowRankLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        A_, B_ = A.to(x.dtype), B.to(x.dtype)
        inner = rows @ A_.T
        y = F.linear(rows, W, b).addmm_(inner, B_.T)
        ctx.save_for_backward(rows, W, A_, B_, inner)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, W, A_, B_, inner = ctx.saved_tensors
        grad = grad.reshape(-1, W.shape[0])
        grad_inner = grad @ B_
        grad_x = (grad @ W).addmm_(grad_inner, A_).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, (grad_inner.T @ rows).float(), (grad.T @ inner).float()


def low_rank_linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """x W^T + b + (x A^T) B^T for frozen W and b: x [.. d_in], W [d_out, d_in], A [r, d_in], B [d_out, r].

    No gradient for W, no cast of W, and nothing saved but x, W and x A^T. A and B stay float32 outside, the products
    run in the dtype of x.
    """
    y: Tensor = _LowRankLinear.apply(x, W, b, A, B)
    return y


# Attention over the segments of a pack ---------------------------------------------------------------------------


@dataclass
class Plan:
    """Where the segments of a packed row lie. Travels through the model as the keyword argument `plan`.

    `calls` counts the attention layers that honoured it, so that a model that ignores it is found out.
    """

    lengths: list[int]
    calls: int = 0


SHORT_SEGMENT = 512
"""Up to here plain products beat the stock kernel on a CPU (benchmarks/attention); above, its memory is linear."""


class _ShortAttention(Function):
    """softmax(scale q k^T + causal) v for one short segment: q [H, L, D], k and v [G, L, D] -> [L, H, D].

    The H / G query heads that share a key head lie under each other in one product, so that k and v are not repeated
    and their gradients sum by themselves. The probabilities are computed again in the backward pass, not kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        H, L, D = q.shape
        q_ = q.reshape(k.shape[0], -1, D)
        probabilities = _probabilities(q_, k, L, scale)
        ctx.save_for_backward(q_, k, v)
        ctx.scale = scale
        return torch.bmm(probabilities, v).view(H, L, v.shape[-1]).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_, k, v = ctx.saved_tensors
        L, H, D_v = grad.shape
        grad_out = grad.transpose(0, 1).reshape(k.shape[0], -1, D_v)
        probabilities = _probabilities(q_, k, L, ctx.scale)
        grad_v = torch.bmm(probabilities.transpose(1, 2), grad_out)
        grad_p = torch.bmm(grad_out, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_p, probabilities, -1, q_.dtype).mul_(ctx.scale)
        grad_q = torch.bmm(grad_scores, k).view(H, L, -1)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q_)
        return grad_q, grad_k, grad_v, None


def _probabilities(q_: Tensor, k: Tensor, L: int, scale: float) -> Tensor:
    """[G, H / G * L, L], causal."""
    scores = torch.bmm(q_, k.transpose(1, 2)).mul_(scale)
    future = torch.ones(L, L, dtype=torch.bool, device=k.device).triu_(1)
    scores.view(k.shape[0], -1, L, L).masked_fill_(future, float("-inf"))
    return torch.softmax(scores, dim=-1)


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The same by autograd, with a sliding window (a token sees the last `window` positions) and soft-capping."""
    H, L, _ = q.shape
    k, v = (t.repeat_interleave(H // t.shape[0], dim=0) for t in (k, v))
    scores = (q @ k.transpose(1, 2) * scale).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(L, device=q.device)[:, None] - torch.arange(L, device=q.device)[None, :]
    hidden = (distance < 0) | (distance >= (window or L))
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype) @ v).transpose(0, 1)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    plan: Plan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment of a packed row, none between them.

    The signature is that of transformers' attention interface, so any architecture that uses it can be packed:
    query [1, H, T, D], key and value [1, G, T, D] -> ([1, T, H, D], None). Weights have no dropout: the base is
    frozen and in evaluation mode. Attention sinks and position biases are not computed here: they are refused.
    """
    if s_aux is not None or unused.get("position_bias") is not None:
        raise NotImplementedError(f"{type(module).__name__}: packed attention with sinks or a position bias")
    plan.calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for q, k, v in zip(*(t[0].split(plan.lengths, dim=1) for t in (query, key, value)), strict=True):
        length = q.shape[1]
        if softcap is not None or (sliding_window is not None and sliding_window < length):
            out = _plain_attention(q, k, v, scale, sliding_window, softcap)
        elif length <= SHORT_SEGMENT and q.device.type == "cpu":
            out = _ShortAttention.apply(q, k, v, scale)
        else:
            stock = F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True
            )
            out = stock[0].transpose(0, 1)
        outputs.append(out)
    return torch.cat(outputs)[None], None


# The output head and the loss ------------------------------------------------------------------------------------

LOGITS_AT_ONCE = 2**24
"""Elements of a chunk of logits: 64 MiB of float32."""


class _LinearLogProbs(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, W: Tensor, b: Tensor | None, targets: Tensor) -> Tensor:
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        step = max(1, LOGITS_AT_ONCE // W.shape[0])
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            logits = F.linear(hidden[rows], W, b).float()
            log_normaliser = logits.logsumexp(-1)
            log_probs[rows] = logits.gather(1, targets[rows, None])[:, 0] - log_normaliser
            # d log p(target) / d logits = onehot(target) - softmax, in the memory of the logits
            grad_logits = logits.sub_(log_normaliser[:, None]).exp_().neg_()
            grad_logits[torch.arange(len(grad_logits)), targets[rows]] += 1
            grad[rows] = grad_logits.to(W.dtype) @ W
        ctx.save_for_backward(grad)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_log_probs[:, None].to(grad.dtype), None, None, None


def linear_log_probs(hidden: Tensor, W: Tensor, b: Tensor | None, targets: Tensor) -> Tensor:
    """log softmax(W hidden[i] + b)[targets[i]] in nats, float32 [S], for a frozen head W [V, d].

    hidden [S, d] holds supervised positions only. Logits exist for one chunk of rows at a time, and the gradient of
    each log-probability for its row is computed while they do: the backward pass is one multiplication.
    """
    log_probs: Tensor = _LinearLogProbs.apply(hidden, W, b, targets)
    return log_probs


def head_log_probs(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """The same for a head that is any function (a delta on it, soft-capping): computed again in the backward pass."""

    def chunk(h: Tensor, t: Tensor) -> Tensor:
        return -F.cross_entropy(head(h).float(), t, reduction="none")

    step = max(1, LOGITS_AT_ONCE // vocabulary)
    parts = zip(hidden.split(step), targets.split(step), strict=True)
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False) for h, t in parts])
