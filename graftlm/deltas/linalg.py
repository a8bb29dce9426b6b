"""Linear algebra that several methods and inits start from: singular vectors and pivoted columns. No method.

Signs are fixed: the positive entries of a left vector have more of its length than the negative ones. A matrix that
differs by a rounding then has nearly the same vectors, where the largest entry would often be another one.
"""

import torch
from torch import Tensor


def top_singular(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r greatest singular values with their vectors, exactly: W [m, n] -> (U [m, r], S [r], Vh [r, n])."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return _with_signs(U[:, :r], S[:r], Vh[:r])


def top_singular_fast(
    W: Tensor, r: int, generator: torch.Generator, *, oversampling: int = 16, power_iterations: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, nearly: a randomised range finder. Halko, Martinsson and Tropp 2009, arXiv:0909.4061, algorithms 4.4
    and 5.1. The error falls as (s[r + oversampling] / s[r])^(2 power_iterations + 1); U^T W V = diag(S) is exact.
    """
    k = min(r + oversampling, *W.shape)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], k, generator=generator).to(W)).Q
    for _ in range(power_iterations):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return _with_signs(Q @ U[:, :r], S[:r], Vh[:r])


def pivots(W: Tensor, r: int) -> Tensor:
    """The columns [r] that QR with column pivoting takes first: each the one farthest from the span of those before.

    Businger and Golub 1965. W [m, n]; two products with a vector a step, in double precision.
    """
    W = W.double()
    Q = W.new_zeros(W.shape[0], r)
    squares = W.square().sum(0)
    columns = torch.zeros_like(squares[:r], dtype=torch.long)
    for step in range(r):
        columns[step] = column = int(squares.argmax())
        q = W[:, column]
        for _ in range(2):  # twice is enough: one pass of Gram and Schmidt loses digits
            q = q - Q @ (Q.T @ q)
        Q[:, step] = q = q / q.norm().clamp_min(torch.finfo(q.dtype).tiny)
        squares = (squares - (q @ W).square()).index_fill(0, columns[: step + 1], -1.0)
    return columns


def orthonormal(columns: Tensor) -> Tensor:
    """Gram and Schmidt over the columns [m, n], m >= n: the first k of the result span what the first k did."""
    Q, R = torch.linalg.qr(columns)
    signed: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return signed


def _with_signs(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    signs = torch.where((U * U.abs()).sum(0) < 0, -1.0, 1.0)
    return U * signs, S, Vh * signs[:, None]
