"""MiLoRA: Harnessing Minor Singular Components. Wang et al. 2024, arXiv:2406.09044, section 3.

    W = U S V^T    B = U_m (S_m / s)^1/2    A = (S_m / s)^1/2 V_m^T        the r smallest singular values

    A [r, d_in]  B [d_out, r]  s: the method's own factor in front of B A

The principal part of W is frozen, and training starts in the directions that W uses least. The authors' code
divides by s as here.
"""

from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank
from graftlm.deltas.linalg import top_singular


def milora(site: Site, part: Delta) -> dict[str, Tensor]:
    r = rank(part)
    U, S, Vh = top_singular(site.W(), min(site.d_in, site.d_out))
    root = (S[-r:] / part.scale).sqrt()
    return {"A": root[:, None] * Vh[-r:], "B": U[:, -r:] * root}
