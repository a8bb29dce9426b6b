"""LoRA-Mini: Adaptation Matrices Decomposition and Selective Training. Singh et al. 2024, arXiv:2411.15804, section 3.

    h = W x + s B_aux B_train A_train A_aux x        s = alpha / r

    A_aux [inner, d_in], B_aux [d_out, inner], random, frozen; A_train [r, inner], B_train [inner, r], trained

Each factor of LoRA is cut in two, and only the two small matrices in the middle learn: their number of parameters does
not depend on the width of the model. B_train starts at zero, so that dW = 0. Ours, not the paper's: A_aux and B_aux are
Gaussian with deviations 1 / sqrt(d_in) and 1 / sqrt(inner), and A_train is uniform, so that A = A_train A_aux starts as
large as LoRA's A and a step of B_train moves B as far as a step of LoRA's B. At an embedding the deviation of A_aux is
1, for a one-hot x.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.starts import fan_in


@config
class LoraMiniConfig(DeltaConfig):
    method: Literal["lora-mini"] = "lora-mini"
    r: PositiveCount = 16
    alpha: PositiveRate = 32
    inner: PositiveCount = 64
    """The paper's a and b, which it lets differ."""


class LoraMini(AdditiveDelta):
    family = "reparameterisation"
    paper = "Singh et al. 2024, arXiv:2411.15804"
    formula = "2 * r * inner"
    learning_rate = 8e-3
    kinds = ("linear", "embedding")
    A_aux: Tensor
    B_aux: Tensor

    def __init__(self, site: Site, config: LoraMiniConfig) -> None:
        super().__init__(site, config)
        r, inner, generator = config.r, config.inner, site.generator()
        A_aux = torch.randn(inner, site.d_in, generator=generator) / fan_in(site) ** 0.5
        B_aux = torch.randn(site.d_out, inner, generator=generator) / inner**0.5
        self.register_buffer("A_aux", A_aux, persistent=False)
        self.register_buffer("B_aux", B_aux, persistent=False)
        self.A_train = nn.Parameter((2 * torch.rand(r, inner, generator=generator) - 1) / inner**0.5)
        self.B_train = nn.Parameter(torch.zeros(inner, r))
        self.scale = config.alpha / r

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A_train @ self.A_aux, self.scale * (self.B_aux @ self.B_train)
