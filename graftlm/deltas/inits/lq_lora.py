"""LQ-LoRA: Low-rank plus Quantized matrix decomposition. Guo et al. 2023, arXiv:2311.12023, section 3.3.

    min over A, B of || sqrt(F) * (W - Q - s B A) ||_F        F = E[(dL/dW)^2], as if F_ij were a_i b_j:
    R (W - Q) C = U S V^T    B = R^-1 U_r (S_r / s)^1/2    A = (S_r / s)^1/2 V_r^T C^-1
    R = diag(mean over columns of F)^1/2    C = diag(mean over rows of F)^1/2

    A [r, d_in]  B [d_out, r]  F [d_out, d_in]  W the weight before quantizing  Q the quantized one

The paper takes means of the roots of F, the authors' code roots of the means ("better empirically"): so here. Q is not
quantized again in turn (docs/decisions/026). One part in a thousand of the mean of F is added to it: a row or column
without a gradient weighs little, and must not weigh nothing.
"""

from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank
from graftlm.deltas.linalg import top_singular

DAMPING = 1e-3


def lq_lora(site: Site, part: Delta) -> dict[str, Tensor]:
    error = site.original() - site.W()
    F = site.statistics["fisher"].to(error)
    F = F / F.mean() + DAMPING
    R, C = F.mean(1).sqrt(), F.mean(0).sqrt()
    U, S, Vh = top_singular(R[:, None] * error * C, rank(part))
    root = (S / part.scale).sqrt()
    return {"A": root[:, None] * Vh / C, "B": U * root / R[:, None]}
