"""LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition. Shi et al. 2024, arXiv:2410.13618, section 3, fig. 3.

    W = P L D U        P a permutation, L [d_out, k] and U [k, d_in] triangular with ones on their diagonals, D diagonal
    W' = W + P L_r (s diag(z) - s_0 diag(z_0)) U_r        z [r], at first z_0 = D_r        s_0 = alpha / r

L_r: the first r columns of L; U_r: the first r rows of U. Both frozen, so a site has r parameters. What is trained here
is dz = z - z_0: the same steps, and weight decay draws towards W. In the paper's figure and in the authors' code the
diagonal alone learns, and s stays; with `train_scale` s learns too.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Flag, PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site


@config
class LolduConfig(DeltaConfig):
    method: Literal["loldu"] = "loldu"
    r: PositiveCount = 64
    """A layer with fewer rows or columns than this takes the whole diagonal."""
    alpha: PositiveRate = 64
    train_scale: Flag = False


class Loldu(AdditiveDelta):
    family = "reparameterisation"
    paper = "Shi et al. 2024, arXiv:2410.13618"
    formula = "min(r, d_in, d_out) + train_scale"
    kinds = ("linear", "embedding")
    learning_rate = 0.00125
    PL: Tensor
    U: Tensor
    D: Tensor

    def __init__(self, site: Site, config: LolduConfig) -> None:
        super().__init__(site, config)
        r = min(config.r, site.d_in, site.d_out)
        self.register_buffer("PL", torch.zeros(site.d_out, r))
        self.register_buffer("U", torch.zeros(r, site.d_in))
        self.register_buffer("D", torch.zeros(r))
        self.dz = nn.Parameter(torch.zeros(r))
        self.scale = config.alpha / config.r
        self.s = nn.Parameter(torch.tensor(self.scale)) if config.train_scale else None

    def start(self) -> None:
        P, L, U = torch.linalg.lu(self.site.W())
        r = len(self.D)
        D = U.diagonal()[:r]
        self.D.copy_(D)
        self.PL.copy_(P @ L[:, :r])
        self.U.copy_(U[:r] / torch.where(D == 0, 1.0, D)[:, None])  # a singular W has zeros there

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.s is None:
            return self.U, self.PL * (self.scale * self.dz)
        return self.U, self.PL * (self.s * (self.D + self.dz) - self.scale * self.D)
