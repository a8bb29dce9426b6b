"""MoSLoRA: Mixture-of-Subspaces in Low-Rank Adaptation. Wu et al. 2024, arXiv:2406.11909, section 3.

    h = W x + s B M A x        A [r, d_in]  M [r, r], the mixer  B [d_out, r]        s = alpha / r

The r subspaces of A and of B, which LoRA pairs one to one (M = 1), are all paired with each other. A and M start random
(Kaiming-uniform, as in the authors' code, or M orthogonal: the paper finds both good) and B at zero, so that dW = 0.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site


@config
class MosLoraConfig(DeltaConfig):
    method: Literal["moslora"] = "moslora"
    r: PositiveCount = 16
    alpha: PositiveRate = 32
    mixer: Literal["kaiming", "orthogonal"] = "kaiming"
    """How M starts."""


class MosLora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Wu et al. 2024, arXiv:2406.11909"
    formula = "r * (d_in + d_out) + r * r"
    learning_rate = 2e-3
    kinds = ("linear", "embedding")

    def __init__(self, site: Site, config: MosLoraConfig) -> None:
        super().__init__(site, config)
        r, draw = config.r, site.generator()
        self.A = nn.Parameter((2 * torch.rand(r, site.d_in, generator=draw) - 1) / site.d_in**0.5)
        M = (2 * torch.rand(r, r, generator=draw) - 1) / r**0.5
        if config.mixer == "orthogonal":
            M = nn.init.orthogonal_(M, generator=draw)
        self.M = nn.Parameter(M)
        self.B = nn.Parameter(torch.zeros(site.d_out, r))
        self.scale = config.alpha / r

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * (self.B @ self.M)
