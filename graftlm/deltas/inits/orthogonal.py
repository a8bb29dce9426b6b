"""Orthogonal factors: both random, and B A = 0. Datta 2024, datta0.github.io/posts/rethink-lora-init; PEFT's
`init_lora_weights="orthogonal"`. No paper.

    A = Q1^T G1 / 10    B = G2 Q2 / 10        A [r, d_in]  B [d_out, r]  G1 [r/2, d_in], G2 [d_out, r/2] ~ N(0, 1)

    Q [r, r] is a random orthogonal matrix, Q1 [r/2, r] and Q2 [r/2, r] are every second row of it: Q2 Q1^T = 0

Both factors learn from the first step on, unlike with B = 0, and nothing has to be taken out of W. PEFT refuses an odd
r; here Q1 has the row that is left over.
"""

import torch
from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank


def orthogonal(site: Site, part: Delta) -> dict[str, Tensor]:
    r, generator = rank(part), site.generator()
    Q = torch.linalg.qr(torch.randn(r, r, generator=generator)).Q
    Q1, Q2 = Q[0::2], Q[1::2]
    G1 = torch.randn(len(Q1), site.d_in, generator=generator)
    G2 = torch.randn(site.d_out, len(Q2), generator=generator)
    return {"A": Q1.T @ G1 / 10, "B": G2 @ Q2 / 10}
