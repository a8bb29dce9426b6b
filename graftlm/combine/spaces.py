"""The spaces in which a rule acts: what its matrices are, and how its result becomes factors again.

    core       M_i = U^T D_i V        D = U M V^T        (`core.py`)
    knots      S V_i^T = U^T D_i      D = U M            KnOTS: Stoica et al. 2024, arXiv:2410.19735, section 4
    ctm        M_i = U_k^T D_i V_k    D = U_k M V_k^T    Compress then Merge: He et al. 2026, arXiv:2606.03723
    product    D_i                    D = M
    factors    A_i and B_i apart      D = B A            PEFT's add_weighted_adapter without SVD

D_i = s_i B_i A_i. KnOTS has [D_1 .. D_n] = U S [V_1^T .. V_n^T], and S enters once. In CtM U_k and V_k are the first k
vectors of U and V, so k, the rank of the result, is known before. (The abstract says that both come from the weights
alone, not how; ours are those of the truncated higher-order SVD.)

In all but `factors` a rule gives the same for (B_i R, R^-1 A_i) as for (B_i, A_i), which are the same adapter.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from graftlm.combine.core import Change, Factorization, factorize, in_basis, left_basis, right_basis

Space = Literal["core", "knots", "ctm", "product", "factors"]
SPACES: tuple[Space, ...] = get_args(Space)
OF_PRODUCTS: tuple[Space, ...] = ("core", "knots", "ctm", "product")
"""The spaces that depend on the D_i alone."""


class Coordinates(NamedTuple):
    """The changes of one site in a space: D_i = U M_i V^T, where None is the identity."""

    matrices: list[Tensor]
    U: Tensor | None
    V: Tensor | None
    lost: float
    """sqrt(1 - sum ||M_i||^2 / sum ||D_i||^2): 0 but in `ctm`."""

    def factorize(self, M: Tensor, rank: int | None, energy: float) -> Factorization:
        """U M V^T as B A."""
        X, Y, error = factorize(M, rank, energy)
        return Factorization(
            X if self.U is None else self.U @ X, Y if self.V is None else Y @ self.V.T, max(error, self.lost)
        )


def coordinates(changes: Sequence[Change], space: Space, rank: int | None = None) -> Coordinates:
    """The changes of one site in a space of products; `rank` is the k of `ctm`."""
    if space == "product":
        return Coordinates([change.matrix() for change in changes], None, None, 0.0)
    U = left_basis(changes)
    if space == "knots":
        return Coordinates([s * (U.T @ B.double()) @ A.double() for A, B, s in changes], U, None, 0.0)
    V = right_basis(changes)
    matrices = [in_basis(change, U, V) for change in changes]
    if space == "core":
        return Coordinates(matrices, U, V, 0.0)
    blocks = [M[:rank, :rank] for M in matrices]
    whole, inside = (sum(float(M.square().sum()) for M in some) for some in (matrices, blocks))
    lost = max(0.0, 1 - inside / whole) ** 0.5 if whole and blocks[0].shape != matrices[0].shape else 0.0
    return Coordinates(blocks, U[:, :rank], V[:, :rank], lost)
