"""Many adapters over shared bases: Bruel Gabrielsson et al. 2024, "Compress then Serve", arXiv:2407.00066.

    min_{U, V, S_1 .. S_n} sum_i ||D_i / ||D_i|| - U S_i V^T||^2        U [d_out, k]  V [d_in, k]

    full       S_i [k, k], U and V orthonormal: S_i = U^T D_i V / ||D_i||, and the loss is n - sum_i ||S_i||^2
    diagonal   S_i diagonal, U and V free: a CP decomposition of the D_i as one tensor

Adapter i is then the LoRA A = V^T, B = ||D_i|| U S_i: of all adapters, U and V are stored once. The division by ||D_i||
keeps one large adapter from ruling. Adapters that share nothing need k = sum_i r_i for no error; in clusters with bases
of their own, each adapter is in the one where its error is the smallest.

Each step minimizes exactly over one of U, V and the S_i, in core space (`core.py`), so the loss never rises. U and V
start, in `full`, as the singular vectors of the D_i / ||D_i|| side by side and stacked, and in `diagonal` as the k
largest singular triples of all of them.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graftlm.adapters.adapter import Adapter
from graftlm.combine.changes import changes_of
from graftlm.combine.compose import NAME, check_one_base, in_order, loaded, lora_with, read_adapters, with_chat
from graftlm.combine.core import Change, in_basis, left_basis, numerical_rank, right_basis
from graftlm.errors import RecipeError

Fit = Callable[[Tensor, int], tuple[Tensor, Tensor]]

ROUNDS, CLOSE = 500, 1e-12
"""The most steps, and the fall of the mean loss below which they end. `full` needs few. `diagonal` may near its
limit slowly: after 500 steps at k = 4, random adapters of rank 3, 2 and 4 are 4e-5 above what 8,000 steps reach."""


class Basis(NamedTuple):
    """The bases that the adapters of one cluster share."""

    U: Tensor
    """[d_out, k]"""
    V: Tensor
    """[d_in, l], where k and l are the rank asked for, or less where the changes have fewer dimensions"""


class Compressed(NamedTuple):
    """The changes of one site over shared bases: D_i = U S_i V^T, with U and V of the cluster of i."""

    bases: list[Basis]
    cluster: list[int]
    """Which basis each change has."""
    cores: list[Tensor]
    """S_i [k, l], with the size of D_i; diagonal [k] where that was asked for."""
    errors: list[float]
    """||D_i - U S_i V^T|| / ||D_i||."""

    def change(self, i: int) -> Change:
        """U S_i V^T as a LoRA of rank l, whose A is the same for the whole cluster."""
        U, V = self.bases[self.cluster[i]]
        S = self.cores[i]
        return Change(V.T, U * S if S.ndim == 1 else U @ S)

    @property
    def numbers(self) -> int:
        """How many numbers are stored: the bases once, and each S_i."""
        return sum(U.numel() + V.numel() for U, V in self.bases) + sum(S.numel() for S in self.cores)


class SiteCompression(NamedTuple):
    """The compressed adapters at one site."""

    errors: dict[int, float]
    """Number of the adapter -> its error."""
    bytes: int
    """Of U, V and the S_i, float32."""
    bytes_before: int
    """Of the A_i and B_i, float32."""


class Compression(NamedTuple):
    """Adapters over shared bases, each as a LoRA."""

    adapters: list[Adapter]
    """Those given, in their order."""
    sites: dict[str, SiteCompression]
    notes: list[str]
    """Warnings: parts of the adapters that the result does not have."""


@torch.no_grad()
def compress(
    model_or_base: nn.Module | str,
    adapters: Sequence[Adapter | str | Path],
    *,
    rank: int,
    diagonal: bool = False,
    clusters: int = 1,
    tolerance: float = CLOSE,
) -> Compression:
    """Give the adapters of one base, layer by layer, shared U and V of `rank`, in at most `clusters` groups.

    `tolerance` is the fall of the mean loss below which steps end: of many adapters, a larger one saves hours. The
    model is left as it was. Raises RecipeError for a rank or a number of clusters below 1, and what `compose` raises
    for adapters.
    """
    members = read_adapters(adapters)
    if not members or rank < 1 or clusters < 1:
        raise RecipeError(
            f"{len(members)} adapters, rank {rank}, {clusters} clusters: each must be 1 or more",
            code="unusable-settings",
        )
    check_one_base(members)
    model = loaded(model_or_base)
    found: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in members]
    sites: dict[str, SiteCompression] = {}
    with ExitStack() as stack:
        each = [
            stack.enter_context(changes_of(model, member, f"{NAME}-{number}", needs_rank=False))
            for number, member in enumerate(members)
        ]
        for site in in_order(model, each):
            here = {number: changes[site]() for number, changes in enumerate(each) if site in changes}
            made = compress_changes(
                list(here.values()), rank, diagonal=diagonal, clusters=clusters, tolerance=tolerance
            )
            for place, number in enumerate(here):
                A, B, _ = made.change(place)
                found[number][site] = A.float(), B.float()
            sites[site] = SiteCompression(
                dict(zip(here, made.errors, strict=True)),
                4 * made.numbers,
                4 * sum(change.A.numel() + change.B.numel() for change in here.values()),
            )
    results = [with_chat(lora_with(model, f), [m]) for f, m in zip(found, members, strict=True)]
    return Compression([made for made, _ in results], sites, [note for _, notes in results for note in notes])


def compress_changes(
    changes: Sequence[Change], rank: int, *, diagonal: bool = False, clusters: int = 1, tolerance: float = CLOSE
) -> Compressed:
    """The changes of one site over shared bases, float64."""
    U, V = left_basis(changes), right_basis(changes)
    cores = [in_basis(change, U, V) for change in changes]
    norms = [float(M.norm()) for M in cores]
    T = torch.stack([M / norm if norm > 0 else M for M, norm in zip(cores, norms, strict=True)])
    fit = partial(_diagonal if diagonal else _full, tolerance=tolerance)
    own = _clusters(T, rank, fit, min(clusters, len(T)), diagonal=diagonal)
    bases, number, S, errors = list[Basis](), [0] * len(T), [T[0]] * len(T), [0.0] * len(T)
    for place, cluster in enumerate(own.unique().tolist()):
        inside = (own == cluster).nonzero().flatten()
        P, Q = fit(T[inside], rank)
        bases.append(Basis(U @ P, V @ Q))
        here, lost = _cores(T[inside], P, Q, diagonal=diagonal)
        for i, M, error in zip(inside.tolist(), here, lost.tolist(), strict=True):
            number[i], S[i], errors[i] = place, norms[i] * M, error**0.5
    return Compressed(bases, number, S, errors)


# In core space: T [n, p, q] are the D_i / ||D_i|| --------------------------------------------------------------------


def _full(T: Tensor, k: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Orthonormal P [p, k] and Q [q, k] that maximize sum_i ||P^T T_i Q||^2, each exactly for the other."""
    P, Q = _left(T, k), _left(T.mT, k)
    before = float("-inf")
    for _ in range(ROUNDS):
        inside = float((P.T @ T @ Q).square().sum())
        if inside - before <= tolerance * len(T):
            break
        before = inside
        P = _left(T @ Q, k)
        Q = _left(T.mT @ P, k)
    return P, Q


def _left(T: Tensor, k: int) -> Tensor:
    """The first k left singular vectors of [T_1 .. T_n], which are those of R^T where the rows stacked are Q R."""
    R = torch.linalg.qr(T.mT.flatten(0, 1), mode="r").R
    P, S, _ = torch.linalg.svd(R.T, full_matrices=False)
    first: Tensor = P[:, : min(k, numerical_rank(S))]
    return first


def _diagonal(T: Tensor, k: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """P [p, k] and Q [q, k] that minimize sum_i ||T_i - P diag(s_i) Q^T||^2 by alternating least squares."""
    left, sizes, right = torch.linalg.svd(T, full_matrices=False)
    top = sizes.flatten().argsort(descending=True, stable=True)[: min(k, max(1, int((sizes > 0).sum())))]
    P, Q = left.mT.flatten(0, 1)[top].T, right.flatten(0, 1)[top].T
    before = float("inf")
    for _ in range(ROUNDS):
        s, lost = _cores(T, P, Q, diagonal=True)
        if before - float(lost.sum()) <= tolerance * len(T):
            break
        before = float(lost.sum())
        P = _solved(torch.einsum("npq,qk,nk->pk", T, Q, s), (Q.T @ Q) * (s.T @ s))
        Q = _solved(torch.einsum("npq,pk,nk->qk", T, P, s), (P.T @ P) * (s.T @ s))
        P, Q = P / P.norm(dim=0).clamp_min(1e-300), Q / Q.norm(dim=0).clamp_min(1e-300)
    return P, Q


def _cores(T: Tensor, P: Tensor, Q: Tensor, *, diagonal: bool) -> tuple[Tensor, Tensor]:
    """The best S_i, [n, k, l] or of their diagonals [n, k], and ||T_i - P S_i Q^T||^2 [n]."""
    if not diagonal:
        S = P.T @ T @ Q
        return S, (T - P @ S @ Q.T).square().sum((1, 2))
    s = _solved(torch.einsum("npq,pk,qk->nk", T, P, Q), (P.T @ P) * (Q.T @ Q))
    return s, (T - (P * s[:, None]) @ Q.T).square().sum((1, 2))


def _solved(C: Tensor, G: Tensor) -> Tensor:
    """C G^-1 of a symmetric G, over its eigenvalues above rounding."""
    made: Tensor = C @ torch.linalg.pinv(G, rtol=CLOSE, hermitian=True)
    return made


def _clusters(T: Tensor, k: int, fit: Fit, count: int, *, diagonal: bool) -> Tensor:
    """The cluster of each [n]: by turns bases for the members, and each to the bases that lose the least of it.

    They start as the one that a common basis loses the most of, and then the one that those before lose the most of.
    """

    def losses(groups: Sequence[Tensor]) -> Tensor:
        return torch.stack([_cores(T, *fit(group, k), diagonal=diagonal)[1] for group in groups], dim=1)

    if count == 1:
        return torch.zeros(len(T), dtype=torch.long)
    chosen = [int(losses([T]).argmax())]
    while len(chosen) < count:
        chosen.append(int(losses([T[i : i + 1] for i in chosen]).amin(1).argmax()))
    own = losses([T[i : i + 1] for i in chosen]).argmin(1)
    best, before = own, float("inf")
    for _ in range(ROUNDS):
        own = own.unique(return_inverse=True)[1]
        lost = losses([T[own == cluster] for cluster in range(int(own.max()) + 1)])
        total = float(lost.gather(1, own[:, None]).sum())
        if before - total <= CLOSE * len(T):
            break
        best, before = own, total
        own = lost.argmin(1)
    return best
