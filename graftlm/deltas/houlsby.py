"""Adapters. Houlsby et al. 2019, arXiv:1902.00751, section 2.1 and figure 2.

    y' = y + U f(D y + d) + u        y [.., d_model] the output of an attention or feed-forward sub-layer
                                     D [r, d_model]  d [r]  U [d_model, r]  u [d_model]; f = GELU

Both sub-layers of every transformer layer get one, before the residual sum. U starts at zero, so the fresh adapter is
the identity (the paper: a normal distribution with a deviation of 0.01, which nearly is). The paper also trains the
layer norms: add a delta `norm-tuning` for that.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import Base, Delta, DeltaConfig, Site, Targets


@config
class HoulsbyConfig(DeltaConfig):
    method: Literal["houlsby"] = "houlsby"
    r: PositiveCount = 32
    targets: Targets = "all-sublayers"


class Houlsby(Delta):
    family = "addition"
    paper = "Houlsby et al. 2019, arXiv:1902.00751"
    formula = "2 * r * d_out + r + d_out"
    learning_rate = 2e-3
    kinds = ("sublayer",)
    not_mergeable = "there is a non-linear function between its two matrices"

    def __init__(self, site: Site, config: HoulsbyConfig) -> None:
        super().__init__(site, config)
        D = torch.randn(config.r, site.d_out, generator=site.generator())
        self.D = nn.Parameter(D / site.d_out**0.5)
        self.d = nn.Parameter(torch.zeros(config.r))
        self.U = nn.Parameter(torch.zeros(site.d_out, config.r))
        self.u = nn.Parameter(torch.zeros(site.d_out))

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + F.linear(F.gelu(F.linear(y, self.D, self.d)), self.U, self.u)
