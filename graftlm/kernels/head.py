"""The output head and what the loss reads of its distributions, without logits of all positions at once.

Each is the fast form of a plain equation that stands in its docstring, and is tested against it, gradients included.
S supervised positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from graftlm.kernels.linear import slices

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
        for rows in slices(len(targets), LOGITS_AT_ONCE // W.shape[0]):
            logits = F.linear(hidden[rows], W, b)
            towards = W[targets[rows]]  # d log p(target) / d hidden = (onehot(target) - softmax) W
            for inner in slices(len(logits), SOFTMAX_AT_ONCE // W.shape[0]):
                z, target, slope = logits[inner], targets[rows][inner, None], None
                if softcap is not None:
                    tanh = z.float().div_(softcap).tanh_()
                    z, slope = tanh * softcap, 1 - tanh.square_()
                    towards[inner] *= slope.gather(1, target).to(towards.dtype)
                chunk = z.log_softmax(-1, dtype=torch.float32)
                log_probs[rows][inner] = chunk.gather(1, target)[:, 0]
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
        for rows in slices(S, LOGITS_AT_ONCE // V):
            logits = F.linear(hidden[rows], W, b)
            others = [comparison.logits(rows) for comparison in comparisons]
            slopes = [torch.empty_like(logits) for _ in range(count)]  # of each reading, for the logits
            towards[rows] = W[targets[rows]]
            for inner in slices(len(logits), SOFTMAX_AT_ONCE // V):
                at = slice(rows.start + inner.start, min(rows.start + inner.stop, rows.stop))
                z, target, bend = logits[inner].float(), targets[at, None], None
                if softcap is not None:
                    tanh = z.div(softcap).tanh_()
                    z, bend = tanh * softcap, 1 - tanh.square_()
                    towards[at] *= bend.gather(1, target).to(towards.dtype)
                log_softmax = z.log_softmax(-1)
                log_probs[at] = log_softmax.gather(1, target)[:, 0]
                value_and_slope = [(z.gather(1, target)[:, 0] - log_probs[at], log_softmax.exp_())]
                value_and_slope += [c.distance(z, o[inner].float()) for c, o in zip(comparisons, others, strict=True)]
                value_and_slope += [(z.mean(-1), torch.full_like(z, 1 / V))] if with_means else []
                for reading, slope, (values, of_logits) in zip(readings, slopes, value_and_slope, strict=True):
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
    values = _LinearReadings.apply(hidden, W, b, targets, softcap, comparisons, with_means)
    return _readings(values, with_means)


def _readings(values: Sequence[Tensor], with_means: bool) -> Readings:
    log_probs, normalisers, *distances = values
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
        values = [-F.cross_entropy(z, t, reduction="none"), z.logsumexp(-1)]
        values += [_Distance.apply(z, other.logits(rows).float(), other.distance) for other in comparisons]
        return (*values, z.mean(-1)) if with_means else tuple(values)

    parts = [
        checkpoint(chunk, hidden[rows], targets[rows], rows, use_reentrant=False)
        for rows in slices(max(1, len(targets)), LOGITS_AT_ONCE // vocabulary)
    ]
    return _readings([torch.cat(same) for same in zip(*parts, strict=True)], with_means)
