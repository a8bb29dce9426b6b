"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation. Bini et al. 2025, arXiv:2503.18225.

    dW = (lambda / r) B N A diag(w)        A [r, d_in]  B [d_out, r]  N = diag(1 / (|a_i| |b_i|)), a_i row i of A, b_i
                                           column i of B; w [d_in] the lengths of the columns of W, frozen

A and B give directions alone: each of the r products of unit vectors has the strength lambda / r, so that without w
the Frobenius norm of dW is at most lambda. lambda [1] is learnt; `boundary` is its first value.

The paper writes the norm of W as one factor; the authors' contribution to PEFT has the length of each column. A starts
as LoRA's, B at zero, as in PEFT; other implementations start both at random and take the fresh change out of W. A
length below 1e-4 counts as 1e-4, as in PEFT: a column of zeros has no direction. So the first step gives dW the whole
strength of lambda, whatever the learning rate: `boundary` is 1 here, and 15 in PEFT.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, PeftLayout, Site
from graftlm.deltas.starts import uniform_A

SHORTEST = 1e-4


@config
class DeloraConfig(DeltaConfig):
    method: Literal["delora"] = "delora"
    r: PositiveCount = 8
    boundary: PositiveRate = 1
    """The first value of lambda. PEFT's is 15."""


class Delora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Bini et al. 2025, arXiv:2503.18225"
    formula = "r * (d_in + d_out) + 1"
    learning_rate = 2e-3
    peft = PeftLayout(
        type="DELORA",
        tensors={"A": "delora_A", "B": "delora_B", "strength": "delora_lambda", "w": "delora_w_norm"},
        fields={"r": "r", "boundary": "delora_lambda", "dropout": "module_dropout"},
        patterns={"r": "rank_pattern", "boundary": "lambda_pattern"},
        defaults={"delora_lambda": 15},
        constants={"bias": "none"},
    )
    w: Tensor

    def __init__(self, site: Site, config: DeloraConfig) -> None:
        super().__init__(site, config)
        self.A = nn.Parameter(uniform_A(site, config.r, site.generator()))
        self.B = nn.Parameter(torch.zeros(site.d_out, config.r))
        self.strength = nn.Parameter(torch.full((1,), float(config.boundary)))
        self.register_buffer("w", torch.ones(site.d_in))

    def start(self) -> None:
        self.w.copy_(self.site.W().norm(dim=0))

    def factors(self) -> tuple[Tensor, Tensor]:
        lengths = self.A.norm(dim=1).clamp_min(SHORTEST) * self.B.norm(dim=0).clamp_min(SHORTEST)
        return (self.strength / len(self.A) / lengths)[:, None] * self.A * self.w, self.B
