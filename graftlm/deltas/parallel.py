"""The scaled parallel adapter: Towards a Unified View of Parameter-Efficient Transfer Learning. He et al. 2021,
arXiv:2110.04366, sections 3.3 and 4.5.

    y' = y + s (U relu(D x + d) + u)        x, y [.., d_model] the input and the output of the feed-forward block
                                            D [r, d_model]  d [r]  U [d_model, r]  u [d_model]; s = 4

Beside the block, not after it. U starts at zero and D like LoRA's A, as in the authors' code. x is what the block
reads: in a model that norms first, the normed residual stream.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import Base, Delta, DeltaConfig, Site, Targets


@config
class ParallelConfig(DeltaConfig):
    method: Literal["parallel"] = "parallel"
    r: PositiveCount = 64
    s: PositiveRate = 4.0
    """What the adapter's output is multiplied by."""
    targets: Targets = "all-mlp"


class Parallel(Delta):
    family = "addition"
    paper = "He et al. 2021, arXiv:2110.04366"
    formula = "2 * r * d_out + r + d_out"
    learning_rate = 8e-3
    kinds = ("sublayer",)
    not_mergeable = "there is a non-linear function between its two matrices"

    def __init__(self, site: Site, config: ParallelConfig) -> None:
        super().__init__(site, config)
        self.s = config.s
        D = torch.rand(config.r, site.d_in, generator=site.generator())
        self.D = nn.Parameter((2 * D - 1) / site.d_in**0.5)
        self.d = nn.Parameter(torch.zeros(config.r))
        self.U = nn.Parameter(torch.zeros(site.d_out, config.r))
        self.u = nn.Parameter(torch.zeros(site.d_out))

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + self.s * F.linear(F.relu(F.linear(x, self.D, self.d)), self.U, self.u)
