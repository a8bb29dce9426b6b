"""PiSSA: Principal Singular Values and Singular Vectors Adaptation. Meng et al. 2024, arXiv:2404.02948, equations 2-4.

    W = U S V^T    B = U_r (S_r / s)^1/2    A = (S_r / s)^1/2 V_r^T        the r greatest singular values

    A [r, d_in]  B [d_out, r]  s: the method's own factor in front of B A

So s B A is the best approximation of W of rank r; what is left of W is frozen. The paper has s = 1 (alpha = r).
"""

from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank
from graftlm.deltas.linalg import top_singular


def pissa(site: Site, part: Delta) -> dict[str, Tensor]:
    U, S, Vh = top_singular(site.W(), rank(part))
    root = (S / part.scale).sqrt()
    return {"A": root[:, None] * Vh, "B": U * root}
