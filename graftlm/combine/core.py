"""Core space: the changes of several adapters at one site as small matrices, and back, without loss.

Panariello et al. 2025, arXiv:2509.17786, section 4.

    D_i = s_i B_i A_i = U M_i V^T        M_i = U^T D_i V        A_i [r_i, d_in]  B_i [d_out, r_i]  M_i [k, l]

U [d_out, k] are the left singular vectors of [D_1 .. D_n], V [d_in, l] the right ones of the D_i stacked. k and l are
at most the sum of the ranks. A rule acts on the M_i, and U M V^T is the result.

The paper takes the singular vectors of the stacked B_i and of the stacked A_i. These change where (B_i, A_i) becomes
(B_i R, R^-1 A_i), which is the same adapter, and a rule for single entries then gives another result. Ours follow from
the sums of D_i D_i^T and D_i^T D_i. So neither such a change nor the order of the adapters matters. The SVD of the sum
of the D_i would be independent of the order too, but adapters that cancel each other, or that share A, leave a part of
its vectors undetermined. Where singular values are equal, vectors are determined only up to a rotation: there a
result may depend on the order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-13
"""Share of the largest singular value below which another one is rounding of float64."""


class Change(NamedTuple):
    """The change D = scale B A of one site."""

    A: Tensor
    """[r, d_in]"""
    B: Tensor
    """[d_out, r]"""
    scale: float = 1.0

    def matrix(self) -> Tensor:
        """D [d_out, d_in], float64."""
        return self.scale * self.B.double() @ self.A.double()


class Factorization(NamedTuple):
    """A matrix M [m, n] as X Y, up to what was cut."""

    X: Tensor
    """[m, r]"""
    Y: Tensor
    """[r, n]"""
    error: float
    """||M - X Y|| / ||M||, Frobenius norms; 0 where nothing was cut."""


def left_basis(changes: Sequence[Change]) -> Tensor:
    """U [d_out, k], float64, orthonormal: the left singular vectors of [D_1 .. D_n], the largest singular value first.

    With A_i^T = Q_i T_i, the matrices s_i B_i T_i^T side by side have the same left singular vectors and values.
    """
    parts = [s * B.double() @ torch.linalg.qr(A.double().T, mode="r").R.T for A, B, s in changes]
    return _left_vectors(torch.cat(parts, dim=1))


def right_basis(changes: Sequence[Change]) -> Tensor:
    """V [d_in, l], float64, orthonormal: the right singular vectors of the D_i stacked."""
    return left_basis([Change(B.T, A.T, s) for A, B, s in changes])


def in_basis(change: Change, U: Tensor, V: Tensor) -> Tensor:
    """M = U^T D V [k, l]."""
    return change.scale * (U.T @ change.B.double()) @ (change.A.double() @ V)


def factorize(M: Tensor, rank: int | None = None, energy: float = 1.0) -> Factorization:
    """The factors of M of the smallest rank that holds it, or of `rank` if that is smaller.

    `energy` below 1: of the smallest rank that keeps this share of ||M||^2. Both: the smaller one.
    """
    P, S, Qh = torch.linalg.svd(M, full_matrices=False)
    whole = numerical_rank(S)
    r = min(whole, rank or whole)
    if energy < 1 and (energies := S.square().cumsum(0))[-1] > 0:
        r = min(r, int((energies < energy * energies[-1]).sum()) + 1)
    error = float(S[r:].norm() / S.norm()) if r < whole else 0.0
    root = S[:r].sqrt()
    return Factorization(P[:, :r] * root, root[:, None] * Qh[:r], error)


def numerical_rank(S: Tensor) -> int:
    """How many singular values, the largest first, are more than rounding; at least 1."""
    return max(1, int((ROUNDING * S[0] < S).sum()))


def _left_vectors(C: Tensor) -> Tensor:
    """The left singular vectors of C [d, n] whose singular values are not 0. Of each the largest entry is positive."""
    Q, R = torch.linalg.qr(C)
    P, S, _ = torch.linalg.svd(R, full_matrices=False)
    U: Tensor = Q @ P[:, : numerical_rank(S)]
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -U, U)
