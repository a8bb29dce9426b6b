"""BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes. Huang et al. 2025, arXiv:2509.15974.

    v = W_v x + b_v + delta        delta [1, d_out], at first 0

Of the biases of query, key and value projections the paper finds the last to be the one to train where data is scarce.
This is `bitfit` on the value projections, with PEFT's name and shape for what is learnt. In a fused projection delta
sits on the rows of the values, for which PEFT has no name. A layer without a bias gets one, as in `bitfit`; PEFT trains
one there too, and cannot merge it.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import config
from graftlm.deltas.base import AroundDelta, Base, DeltaConfig, PeftLayout, Site, Targets


@config
class BeftConfig(DeltaConfig):
    method: Literal["beft"] = "beft"
    targets: Targets = r".*\.(v_proj|v|value|value_proj)"


class Beft(AroundDelta):
    family = "specification"
    paper = "Huang et al. 2025, arXiv:2509.15974"
    formula = "d_out"
    learning_rate = 8e-3
    peft = PeftLayout(type="BEFT", tensors={"delta": "beft_bias"})

    def __init__(self, site: Site, config: BeftConfig) -> None:
        super().__init__(site, config)
        self.delta = nn.Parameter(torch.zeros(1, site.d_out))

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W, self.delta[0] if b is None else b + self.delta[0]

    def output(self, z: Tensor, x: Tensor, base: Base) -> Tensor:
        return z + self.delta[0]
