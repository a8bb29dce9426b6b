"""MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning. Ren et al. 2024, arXiv:2402.17263, 3.2.

    h = W x + s blockdiag(B_1 .. B_n) blockdiag(A_1 .. A_n) x        n = minis, s = alpha / r

    A_i [r, d_in / n], B_i [d_out / n, r]: mini-LoRA i reads slice i of x and writes slice i of h

The rank of dW is n r, at the parameters of one LoRA of rank r. Each A_i starts as LoRA's A does, each B_i at zero. n
must divide the sizes of every layer that it sits on; the authors' code drops what is left over.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, Base, DeltaConfig, Site, check_divides


@config
class MeLoraConfig(DeltaConfig):
    method: Literal["melora"] = "melora"
    r: PositiveCount = 8
    """The rank of each mini-LoRA."""
    alpha: PositiveRate = 16
    minis: PositiveCount = 4


class MeLora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Ren et al. 2024, arXiv:2402.17263"
    formula = "r * (d_in + d_out)"
    learning_rate = 8e-3

    def __init__(self, site: Site, config: MeLoraConfig) -> None:
        super().__init__(site, config)
        n, r = config.minis, config.r
        check_divides(n, "melora: minis", site)
        A = 2 * torch.rand(n, r, site.d_in // n, generator=site.generator()) - 1
        self.A = nn.Parameter(A / (site.d_in // n) ** 0.5)
        self.B = nn.Parameter(torch.zeros(n, site.d_out // n, r))
        self.scale = config.alpha / r

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.block_diag(*self.A), self.scale * torch.block_diag(*self.B)

    def increment(self, x: Tensor, base: Base) -> Tensor:
        """Without the zeros of the block-diagonal matrices: n times fewer products."""
        slices = x.reshape(-1, len(self.A), self.A.shape[2]).transpose(0, 1)
        y = slices @ self.A.mT @ (self.scale * self.B).mT
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)
