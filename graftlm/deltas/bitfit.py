"""BitFit: simple parameter-efficient fine-tuning of biases. Ben Zaken et al. 2021, arXiv:2106.10199, section 3.

    h = W x + b + delta        delta [d_out], at first 0

A linear layer without a bias gets one (a bias of zero is what it has); a norm is left alone where it has none. Merging
gives the layer its bias, and an export to an architecture that has no place for it is refused, never made without it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import config
from graftlm.deltas.base import AroundDelta, Base, DeltaConfig, Site, Targets


@config
class BitFitConfig(DeltaConfig):
    method: Literal["bitfit"] = "bitfit"
    targets: Targets = "all"

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return [site for site in sites if site.kind == "linear" or site.has_bias]


class BitFit(AroundDelta):
    family = "specification"
    paper = "Ben Zaken et al. 2021, arXiv:2106.10199"
    formula = "d_out"
    learning_rate = 2e-3
    kinds = ("linear", "norm")

    def __init__(self, site: Site, config: BitFitConfig) -> None:
        super().__init__(site, config)
        self.delta = nn.Parameter(torch.zeros(site.d_out))

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W, self.delta if b is None else b + self.delta

    def output(self, z: Tensor, x: Tensor, base: Base) -> Tensor:
        return z + self.delta
