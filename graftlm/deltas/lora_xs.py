"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters. Balazy et al. 2024, arXiv:2405.17604, 3.

    h = W x + s B R A x        W = U S V^T, of which the r largest singular values are taken:
                               B = U_r S_r [d_out, r] and A = V_r^T [r, d_in], frozen;  R [r, r], trained

    s = alpha / r; the equation of the paper has no s, and alpha = r, its choice for mathematics, is the default here

The number of parameters does not depend on the width of the model. The paper draws R from N(0, 1e-5^2). Here R starts
at zero unless `deviation` says otherwise: R has its full gradient there too, and the fresh delta is the base exactly.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Count, PositiveCount, PositiveRate, Rate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.linalg import top_singular, top_singular_fast


@config
class LoraXsConfig(DeltaConfig):
    method: Literal["lora-xs"] = "lora-xs"
    r: PositiveCount = 64
    """A layer with fewer rows or columns than this takes all its singular values."""
    alpha: PositiveRate = 64
    deviation: Rate = 0.0
    """Standard deviation of the fresh R; 1e-5 in the paper."""
    power_iterations: Count = 0
    """0 for the exact singular vectors; else nearly those, much sooner where W is large (the authors' code: 10)."""


class LoraXs(AdditiveDelta):
    family = "reparameterisation"
    paper = "Balazy et al. 2024, arXiv:2405.17604"
    formula = "min(r, d_in, d_out) ** 2"
    kinds = ("linear", "embedding")
    learning_rate = 1e-3
    A: Tensor
    B: Tensor

    def __init__(self, site: Site, config: LoraXsConfig) -> None:
        super().__init__(site, config)
        r = min(config.r, site.d_in, site.d_out)
        self.register_buffer("A", torch.zeros(r, site.d_in))
        self.register_buffer("B", torch.zeros(site.d_out, r))
        self.R = nn.Parameter(torch.zeros(r, r))
        if config.deviation:
            nn.init.normal_(self.R, std=config.deviation, generator=site.generator())
        self.scale = config.alpha / config.r
        self.power_iterations = config.power_iterations

    def start(self) -> None:
        W, r, rounds = self.site.W(), len(self.A), self.power_iterations
        if rounds:
            U, S, Vh = top_singular_fast(W, r, self.site.generator(), power_iterations=rounds)
        else:
            U, S, Vh = top_singular(W, r)
        self.A.copy_(Vh)
        self.B.copy_(U * S)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * (self.B @ self.R)
