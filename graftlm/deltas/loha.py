"""LoHa: Low-rank Hadamard product. Yeh et al. 2023, arXiv:2309.14859, equation 3, after FedPara: Hyeon-Woo et al. 2021,
arXiv:2108.06098, proposition 1.

    dW = s (B1 A1) * (B2 A2), element by element        B1, B2 [d_out, r]  A1, A2 [r, d_in]  s = alpha / r

Its rank is up to r^2, and it has these factors exactly: row (i, j) of A is A1_i * A2_j, column (i, j) of B is s times
B1_i * B2_j. So it trains at the price of a LoRA of rank r^2, as long as that is less than what dW itself costs.

The start is that of the authors' code (the papers name none): A1 and A2 from N(0, 1), B1 from N(0, 0.1^2), B2 at zero.
PEFT draws other values and zeroes A2.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, PeftLayout, Site


@config
class LohaConfig(DeltaConfig):
    method: Literal["loha"] = "loha"
    r: PositiveCount = 8
    alpha: PositiveRate = 4


class Loha(AdditiveDelta):
    family = "reparameterisation"
    paper = "Yeh et al. 2023, arXiv:2309.14859"
    formula = "2 * r * (d_in + d_out)"
    learning_rate = 2e-3
    peft = PeftLayout(
        type="LOHA",
        tensors={"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
        fields={"r": "r", "alpha": "alpha"},
        defaults={"alpha": 8},
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
        harmless=("module_dropout", "rank_dropout", "use_effective_conv2d"),
    )

    def __init__(self, site: Site, config: LohaConfig) -> None:
        super().__init__(site, config)
        r, draw = config.r, site.generator()
        self.A1 = nn.Parameter(torch.randn(r, site.d_in, generator=draw))
        self.B1 = nn.Parameter(0.1 * torch.randn(site.d_out, r, generator=draw))
        self.A2 = nn.Parameter(torch.randn(r, site.d_in, generator=draw))
        self.B2 = nn.Parameter(torch.zeros(site.d_out, r))
        self.scale = config.alpha / r

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if len(self.A1) ** 2 > min(self.site.d_in, self.site.d_out):
            return None  # they would be larger than dW
        A = (self.A1[:, None] * self.A2).flatten(0, 1)
        return A, self.scale * (self.B1[:, :, None] * self.B2[:, None]).flatten(1)

    def matrix(self) -> Tensor:
        return self.scale * (self.B1 @ self.A1) * (self.B2 @ self.A2)
