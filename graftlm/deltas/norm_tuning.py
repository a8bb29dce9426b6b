"""LayerNorm tuning. Zhao et al. 2023, arXiv:2312.11420: of the whole model, its norms learn.

    W' = W + (g - W_0)        g [d] learnt, at first W_0        W_0 [d] the gain of the frozen norm
    b' = b + (c - b_0)        c [d] learnt, at first b_0        where the norm has a bias b_0 [d]

This is the paper's LayerNorm-simp.; its main variant also trains embeddings, output head and a connector to images.
g and c are kept whole, as PEFT keeps them. On one norm alone W' = g; as a difference, it adds to other deltas there.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import config
from graftlm.deltas.base import DeltaConfig, PeftLayout, Site, Targets, WeightDelta


@config
class NormTuningConfig(DeltaConfig):
    method: Literal["norm-tuning"] = "norm-tuning"
    targets: Targets = "all-norms"


class NormTuning(WeightDelta):
    family = "specification"
    paper = "Zhao et al. 2023, arXiv:2312.11420"
    formula = "d_in * (1 + has_bias)"
    kinds = ("norm",)
    learning_rate = 5e-3
    peft = PeftLayout(type="LN_TUNING", tensors={"g": "ln_tuning_layers.weight", "c": "ln_tuning_layers.bias"})

    def __init__(self, site: Site, config: NormTuningConfig) -> None:
        super().__init__(site, config)
        self.g = nn.Parameter(torch.ones(site.d_in))
        self.c = nn.Parameter(torch.zeros(site.d_in)) if site.has_bias else None

    def start(self) -> None:
        self.g.copy_(self.site.W())
        if self.c is not None and (bias := self.site.bias()) is not None:
            self.c.copy_(bias)

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias = self.site.bias()
        W = W + (self.g - self.site.W())
        return W, b if b is None or self.c is None or bias is None else b + (self.c - bias)
