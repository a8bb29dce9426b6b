"""QuAILoRA: Quantization-Aware Initialization for LoRA. Lawton et al. 2024, arXiv:2410.14713.

    min over A, B of E || (W - Q - s B A) x ||^2        D = W - Q    M = E[x x^T]
    B = D M A^T (A M A^T)^-1 / s    A = (B^T B)^-1 B^T D / s    in turn, from the singular vectors of D (LoftQ)

    A [r, d_in]  B [d_out, r]  M [d_in, d_in] over calibration tokens  W as it was before quantizing  Q as it is

Each update is the exact minimum over one factor. 1 % of the mean of M's diagonal is added to it, as for CorDA: weights
that no token reads are then not free. At last the factors are balanced, |A| = |B|, which changes no product: one of
them as large as alternation leaves it would learn at another rate than the other.
"""

import torch
from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank
from graftlm.deltas.linalg import top_singular

DAMPING = 0.01
ROUNDS = 20


def quailora(site: Site, part: Delta) -> dict[str, Tensor]:
    W = site.original()
    error = (W - site.W()).double()
    M = site.statistics["second_moment"].to(error)
    M = M / M.diagonal().mean() + DAMPING * torch.eye(site.d_in).to(M)
    A = top_singular(error, rank(part))[2]
    LM = error @ M
    for _ in range(ROUNDS):
        B = torch.linalg.lstsq((A @ M @ A.T), A @ LM.T).solution.T
        A = torch.linalg.lstsq(B, error).solution
    # B A = (Q_B R_B) (R_A Q_A)^T: its singular vectors from a product of r x r
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    root = (S / part.scale).sqrt()
    return {"A": (root[:, None] * (Vh @ Q_A.T)).to(W), "B": (Q_B @ U * root).to(W)}
