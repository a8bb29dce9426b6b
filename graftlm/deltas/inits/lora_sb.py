"""LoRA-SB: Initialization using Update Approximation is a Silver Bullet. Ponkshe et al. 2024, arXiv:2411.19557.

    dW = -eta sign(G) = U S V^T    B = U_r    A = V_r^T    R = diag(S_r) / s

    A [r, d_in]  R [r, r]  B [d_out, r]  G = dL/dW [d_out, d_in], the sum over some samples (its sign is the mean's)

For LoRA-XS, W' = W + s B R A, where only R is trained. The start is no fixed point: s B R A is the best approximation
of rank r of the first step that Adam would take with all of W, and the model begins after that step. eta is the
learning rate of that step. The authors' code takes the run's learning rate over its number of warm-up steps, from
3e-7 to 3e-6 in their experiments; an init does not know the run, so here it is 1e-6.
"""

from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank
from graftlm.deltas.linalg import top_singular

ETA = 1e-6


def lora_sb(site: Site, part: Delta) -> dict[str, Tensor]:
    U, S, Vh = top_singular(-site.statistics["gradient"].sign(), rank(part))
    return {"A": Vh, "R": (ETA * S / part.scale).diag(), "B": U}
