"""Full fine-tuning, as a delta: every weight learns, and the base stays where it is.

    W' = W + D        D [d_out, d_in], at first 0        b' = b + d where the layer has a bias

The same gradients and the same optimum as training W itself; what is kept in float32 is the difference, so a base in
half precision loses no small step, and "off" is still the base. Source: the control arm of Hu et al. 2021,
arXiv:2106.09685, section 5. Input embeddings learn apart from a tied head: W' of the one is not W' of the other.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import config
from graftlm.deltas.base import AroundDelta, Base, DeltaConfig, Site, Targets


@config
class FullConfig(DeltaConfig):
    method: Literal["full"] = "full"
    targets: Targets = "all"


class Full(AroundDelta):
    family = "specification"
    paper = "Hu et al. 2021, arXiv:2106.09685"
    formula = "(d_in if kind == 'norm' else d_in * d_out) + has_bias * d_out"
    learning_rate = 0.000125
    kinds = ("linear", "embedding", "norm")

    def __init__(self, site: Site, config: FullConfig) -> None:
        super().__init__(site, config)
        self.D = nn.Parameter(torch.zeros(site.d_in if site.kind == "norm" else (site.d_out, site.d_in)))
        self.d = nn.Parameter(torch.zeros(site.d_out)) if site.has_bias else None

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.D, b if self.d is None or b is None else b + self.d

    def input(self, x: Tensor) -> Tensor | None:
        return None if self.site.kind == "norm" else x

    def output(self, z: Tensor, x: Tensor, base: Base) -> Tensor:
        return z + base.apply(x, self.D, self.d)
