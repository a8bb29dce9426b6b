"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation. Wang et al. 2024, arXiv:2407.05000, algorithm 1.

    G = dL/dW = U S V^T    A = c V[:, 1..r]^T    B = c U[:, r+1..2r]    c = d_out^1/4 / gamma^1/2, gamma = 16

    A [r, d_in]  B [d_out, r]  G [d_out, d_in], the mean over a few batches

s B A is taken out of W. Then the first step of gradient descent on A and B moves s B A along the best approximation of
-G of rank 2 r (theorem 3.1). The size c is derived for s = alpha / sqrt(r) (section 3.3): set `rslora: true`, as the
paper does. Needs 2 r <= d_in, d_out. As in the authors' code the SVD is a randomised one, of 4 r directions.

PEFT 0.21.2 scales B by the singular values of G and leaves A unscaled ("ArB2r", "stable"); neither the paper nor the
authors' code do.
"""

from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import rank
from graftlm.deltas.linalg import top_singular_fast

GAMMA = 16
POWER_ITERATIONS = 4


def lora_ga(site: Site, part: Delta) -> dict[str, Tensor]:
    r = rank(part)
    G, draw = site.statistics["gradient"], site.generator()
    U, _, Vh = top_singular_fast(G, 2 * r, draw, oversampling=2 * r, power_iterations=POWER_ITERATIONS)
    size = site.d_out**0.25 / GAMMA**0.5
    return {"A": size * Vh[:r], "B": size * U[:, r:]}
