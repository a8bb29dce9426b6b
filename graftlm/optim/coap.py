"""COAP: GaLore with directions that are corrected, not taken anew (Xiao et al. 2024, arXiv:2412.00071).

    L(P) = mse(P P^T G, G) (1 - mean over rows of cos(P M, G))      P <- P - 0.1 dL/dP      every T steps (equation 5)
    Q = qr(G^T P)        P <- the right singular vectors of Q^T G^T   every `factor` T steps (equation 6)

    G [n, m] gradient, n <= m;  P [n, r];  M [r, m] Adam's first moment;  T `every`

Directions that change little let the moments, which are not moved with them, go on fitting. All else is as in
galore.py. The gradient of L is cut at a norm of 1 and the moments are left as they are, as in the authors' code.
Departures: the first P is GaLore's, not a random sketch, and rows are those of the matrix after it was turned. Signs of
singular vectors are those of the vectors that they replace, as in galore.py.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.optim.galore import Projecting, leading
from graftlm.training.callback import OptimizerConfig


@config
class CoapConfig(OptimizerConfig):
    name: Literal["coap"] = "coap"
    rank: PositiveCount = 128
    """Directions that are kept of each matrix; one with a side of no more keeps moments of its full size."""
    every: PositiveCount = 32
    """Steps between two corrections."""
    factor: PositiveCount = 5
    """Every so many corrections, one by singular vectors."""
    scale: PositiveRate = 1.0
    """Factor on the learning rate of matrices that are projected."""


class Coap(Projecting):
    paper = "Xiao et al. 2024, arXiv:2412.00071"
    cost = "moments of r rows in place of all; singular vectors of r rows in place of all"

    def renew(self, state: dict[str, Any], G: Tensor) -> None:
        every = self.config.every
        if "P" not in state:
            state["P"] = leading(G, self.config.rank)
        elif state["step"] % (every * self.config.factor) == 0:
            Q = torch.linalg.qr(G.T @ state["P"]).Q
            state["P"] = torch.linalg.svd(Q.T @ G.T, full_matrices=False).Vh.T.contiguous()
        elif state["step"] % every == 0:
            state["P"] = corrected(state["P"], state["M"], G)


def corrected(P: Tensor, M: Tensor, G: Tensor) -> Tensor:
    """P after a step down the gradient of L."""
    P = P.clone().requires_grad_(True)
    with torch.enable_grad():
        L = F.mse_loss(P @ (P.T @ G), G) * (1 - F.cosine_similarity(P @ M, G, dim=1).mean())
        (slope,) = torch.autograd.grad(L, P)
    slope /= slope.norm().clamp(min=1.0)
    return (P - 0.1 * slope).detach()
