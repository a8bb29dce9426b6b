"""QA-LoRA: Quantization-Aware Low-Rank Adaptation. Xu et al. 2023, arXiv:2309.14717, section 3.3 and algorithm 1.

    h = W x + s B A P x        P x = the sums of x over groups of g inputs: [d_in] -> [L], L = d_in / g

    A [r, L]  B [d_out, r]  s = alpha / r

So dW = s B A P is constant inside a group: on a base in int4 with the same groups it goes into the zero points, and the
merged model is int4 again without a new rounding (`merged_int4`). The last group may be shorter.

A is drawn from U(-1/sqrt(d_in), 1/sqrt(d_in)), so that A P x is as large as LoRA's A x; B starts at zero. The paper
writes the sum as g times the mean; the authors' code and its merge leave g out, and PEFT 0.21.2 multiplies by L: an
adapter of either needs B scaled by 1/g or by L/g.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site


@config
class QaLoraConfig(DeltaConfig):
    method: Literal["qa-lora"] = "qa-lora"
    r: PositiveCount = 16
    alpha: PositiveRate = 32
    group: PositiveCount = 32
    """Inputs that share a column of A; a multiple of the base's own groups (32) for the merged model to stay int4."""


class QaLora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Xu et al. 2023, arXiv:2309.14717"
    formula = "r * (-(-d_in // group) + d_out)"
    learning_rate = 2e-3

    def __init__(self, site: Site, config: QaLoraConfig) -> None:
        super().__init__(site, config)
        self.group = config.group
        A = torch.rand(config.r, -(-site.d_in // config.group), generator=site.generator())
        self.A = nn.Parameter((2 * A - 1) / site.d_in**0.5)
        self.B = nn.Parameter(torch.zeros(site.d_out, config.r))
        self.scale = config.alpha / config.r

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A.repeat_interleave(self.group, dim=1)[:, : self.site.d_in], self.scale * self.B
