"""Lin's adapter: a single one, after the feed-forward block alone. Lin, Madotto and Fung 2020, arXiv:2004.03829.

    y' = y + U relu(D n(y) + d) + u        y [.., d_model] the output of the feed-forward block
    n(y) = g * (y - mean y) / std y + c    a layer norm of its own: g, c [d_model], at first 1 and 0
                                           D [r, d_model]  d [r]  U [d_model, r]  u [d_model]

The place is the one that Pfeiffer et al. 2020, arXiv:2005.00247, find best, which made it the common one. Pfeiffer's
own adapter has no norm of its own: that is `houlsby` on `all-mlp`. Lin et al. let it read the sum of y and the residual
stream; a delta at the block lies inside of that sum and reads y. U starts at zero, so that the fresh adapter is the
identity.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import Base, Delta, DeltaConfig, Site, Targets


@config
class LinAdapterConfig(DeltaConfig):
    method: Literal["lin-adapter"] = "lin-adapter"
    r: PositiveCount = 64
    targets: Targets = "all-mlp"


class LinAdapter(Delta):
    family = "addition"
    paper = "Lin, Madotto and Fung 2020, arXiv:2004.03829"
    formula = "2 * r * d_out + r + 3 * d_out"
    learning_rate = 2e-3
    kinds = ("sublayer",)
    not_mergeable = "there is a non-linear function between its two matrices"

    def __init__(self, site: Site, config: LinAdapterConfig) -> None:
        super().__init__(site, config)
        self.g = nn.Parameter(torch.ones(site.d_out))
        self.c = nn.Parameter(torch.zeros(site.d_out))
        D = torch.randn(config.r, site.d_out, generator=site.generator())
        self.D = nn.Parameter(D / site.d_out**0.5)
        self.d = nn.Parameter(torch.zeros(config.r))
        self.U = nn.Parameter(torch.zeros(site.d_out, config.r))
        self.u = nn.Parameter(torch.zeros(site.d_out))

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        normed = F.layer_norm(y, y.shape[-1:], self.g, self.c)
        return y + F.linear(F.relu(F.linear(normed, self.D, self.d)), self.U, self.u)
