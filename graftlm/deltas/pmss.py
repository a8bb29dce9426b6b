"""PMSS: Pretrained Matrices Skeleton Selection for LLM Fine-tuning. Wang et al. 2024, arXiv:2409.16722, section 3.

    h = W x + C U R x        C = W[:, J] [d_out, r] and R = W[I, :] [r, d_in], frozen;  U [r, r], trained, at first 0

A CUR decomposition whose middle is learnt: the update is made of columns and rows of W itself, and its rank may be high
at r^2 parameters a site. J are the first r columns that QR with column pivoting takes from W, and I the first r that it
takes from W^T. C and R are kept with the adapter: W may be in another form when it is used.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.linalg import pivots


@config
class PmssConfig(DeltaConfig):
    method: Literal["pmss"] = "pmss"
    r: PositiveCount = 64
    """A layer with fewer rows or columns than this takes them all."""


class Pmss(AdditiveDelta):
    family = "reparameterisation"
    paper = "Wang et al. 2024, arXiv:2409.16722"
    formula = "min(r, d_in, d_out) ** 2"
    learning_rate = 0.000125
    kinds = ("linear", "embedding")
    C: Tensor
    R: Tensor

    def __init__(self, site: Site, config: PmssConfig) -> None:
        super().__init__(site, config)
        r = min(config.r, site.d_in, site.d_out)
        self.register_buffer("C", torch.zeros(site.d_out, r))
        self.register_buffer("R", torch.zeros(r, site.d_in))
        self.U = nn.Parameter(torch.zeros(r, r))

    def start(self) -> None:
        W, r = self.site.W(), len(self.U)
        self.C.copy_(W[:, pivots(W, r)])
        self.R.copy_(W[pivots(W.T, r)])

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.R, self.C @ self.U
