"""MoSLoRA: Mixture-of-Subspaces in Low-Rank Adaptation. Wu et al. 2024, arXiv:2406.11909, section 3.

    h = W x + s B M A x        A [r, d_in]  M [r, r], the mixer  B [d_out, r]        s = alpha / r

The r subspaces of A and of B, which LoRA pairs one to one (M = 1), are all paired with each other. A and M start random
(Kaiming-uniform, as in the authors' code, or M orthogonal: the paper finds both good) and B at zero, so that dW = 0;
at an embedding A and B start as LoRA's there.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.starts import lora_factors


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
        A, B = lora_factors(site, r, draw)
        self.A = nn.Parameter(A)
        M = (2 * torch.rand(r, r, generator=draw) - 1) / r**0.5
        if config.mixer == "orthogonal":
            M = nn.init.orthogonal_(M, generator=draw)
        self.M = nn.Parameter(M)
        self.B = nn.Parameter(B)
        self.scale = config.alpha / r

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * (self.B @ self.M)
