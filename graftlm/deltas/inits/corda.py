"""CorDA: Context-Oriented Decomposition Adaptation. Yang et al. 2024, arXiv:2406.05223, section 3.

    W C = U S V^T    B = U_r (S_r / s)^1/2    A = (S_r / s)^1/2 V_r^T C^-1        the r greatest singular values

    A [r, d_in]  B [d_out, r]  C = E[x x^T] [d_in, d_in]  s: the method's own factor in front of B A

This is the instruction-previewed mode, PEFT's default: C comes from rows like those of training, and training starts
in the directions that they use most. (The knowledge-preserved mode takes C from text to be kept and the r smallest.)
1 % of the mean of C's diagonal is added to it, as the authors do; they double it until a float32 inverse is good
enough, in double precision it always is. B A does not depend on the size of C, but the balance of A and B does: we
scale C to a mean diagonal of 1, where the authors divide by the greatest x and sum over the tokens of a row.
"""

import torch
from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank
from graftlm.deltas.linalg import top_singular

DAMPING = 0.01


def corda(site: Site, part: Delta) -> dict[str, Tensor]:
    W = site.W()
    C = site.statistics["second_moment"].to(W).double()
    C = C / C.diagonal().mean() + DAMPING * torch.eye(site.d_in).to(C)
    U, S, Vh = top_singular((W.double() @ C).to(W), rank(part))
    root = (S / part.scale).sqrt()
    back = torch.linalg.solve(C, Vh.T.double()).T.to(W)  # C is symmetric
    return {"A": root[:, None] * back, "B": U * root}
