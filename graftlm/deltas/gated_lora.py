"""LoRA with a gate on each rank: SoRA, Sparse Low-rank Adaptation. Ding et al. 2023, arXiv:2311.11696, equation 3.

    h = W x + s B diag(g) A x        A [r, d_in]  g [r]  B [d_out, r]        s = alpha / r

A rank whose gate is 0 is gone. A and B start as LoRA's, and g at 1, so that the fresh delta is a fresh LoRA; the
authors draw g from a Gaussian, with which some ranks are nearly shut before anything was learnt.

This is the parameterisation alone: without a callback g learns as A and B do. `sora` shuts gates by a proximal step,
`autolora` and `diffora` search among ranks and sites by them.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.starts import lora_factors


@config
class GatedLoraConfig(DeltaConfig):
    method: Literal["gated-lora"] = "gated-lora"
    r: PositiveCount = 16
    alpha: PositiveRate = 32


class GatedLora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Ding et al. 2023, arXiv:2311.11696"
    formula = "r * (d_in + d_out + 1)"
    learning_rate = 2e-3
    kinds = ("linear", "embedding")

    def __init__(self, site: Site, config: GatedLoraConfig) -> None:
        super().__init__(site, config)
        A, B = lora_factors(site, config.r, site.generator())
        self.A = nn.Parameter(A)
        self.g = nn.Parameter(torch.ones(config.r))
        self.B = nn.Parameter(B)
        self.scale = config.alpha / config.r

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.g[:, None] * self.A, self.scale * self.B
