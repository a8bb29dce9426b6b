"""OLoRA: Orthonormal Low-Rank Adaptation. Buyukakyuz 2024, arXiv:2406.01775.

    W = Q R    B = Q_r [d_out, r], the first r columns    A = R_r [r, d_in], the first r rows

B is orthonormal. W is decomposed without pivoting, so Q_r spans the first r columns of W, and A = Q_r^T W. The factor
s in front of B A is not divided out (as in the paper and in PEFT): s B A is taken out of W.
"""

import torch
from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank


def olora(site: Site, part: Delta) -> dict[str, Tensor]:
    W = site.W()
    Q = torch.linalg.qr(W[:, : rank(part)]).Q  # later columns of W do not change the first ones of Q
    return {"A": Q.T @ W, "B": Q}
