"""Layers of a base with gradients written by hand: frozen and low-rank linear layers, gates, norms, rotary embeddings.

Each is the fast form of a plain equation that stands in its docstring, and is tested against it, gradients included.
T tokens of a pack, r rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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
        x = rows if ctx.needs_input_grad[3] else None  # x is for the gradient of A alone
        ctx.save_for_backward(x, A_, B_, inner, gain, None if gain is None else z)
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


ELEMENTS_AT_ONCE = 2**18
"""Elements of a piece, for each thread: what one operation writes there the next one still finds in the cache."""


def _pieces(x: Tensor) -> list[slice]:
    """Slices over the rows of x [rows, d]; all at once for a compiler, and on a device that hides latencies itself."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    return slices(len(x), ELEMENTS_AT_ONCE * torch.get_num_threads() // x.shape[-1])


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


def slices(count: int, size: int) -> list[slice]:
    """0 .. count in steps of `size`, at least 1."""
    return [slice(start, start + max(1, size)) for start in range(0, count, max(1, size))]
