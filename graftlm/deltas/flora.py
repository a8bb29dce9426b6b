"""FLoRA (fast LoRA): Batched Low-Rank Adaptation of Foundation Models. Wen and Chaudhuri 2023, arXiv:2312.05677.

    W' = W * (B A)                             elementwise; A [r, d_in]  B [d_out, r]
    h = sum_k B_k * (W (A_k * x)) + b          the same without W', for row k of A and column k of B

The second line is how the paper serves a batch in which every row has a B A of its own: the product with W is the
same for all. It costs r products, so it pays for r = 1 and for few tokens; else W' is built.

The fresh delta is to be the identity, B A = 1: the first row of A and the first column of B are 1, the other columns of
B are 0 and the other rows of A are random signs, as large as the first. (With 1 everywhere all k would stay equal.)
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AroundDelta, Base, DeltaConfig, Site

FEW = 64
"""Tokens x (r - 1) up to which r products are faster than to build W': on one core, at widths 576 and 2048."""


@config
class FloraConfig(DeltaConfig):
    method: Literal["flora"] = "flora"
    r: PositiveCount = 4


class Flora(AroundDelta):
    family = "reparameterisation"
    paper = "Wen and Chaudhuri 2023, arXiv:2312.05677"
    formula = "r * (d_in + d_out)"
    learning_rate = 2e-3

    def __init__(self, site: Site, config: FloraConfig) -> None:
        super().__init__(site, config)
        signs = 2.0 * torch.randint(0, 2, (config.r - 1, site.d_in), generator=site.generator()) - 1
        self.A = nn.Parameter(torch.cat([torch.ones(1, site.d_in), signs]))
        self.B = nn.Parameter(torch.eye(1, config.r).repeat(site.d_out, 1))

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W * (self.B @ self.A), b

    def input(self, x: Tensor) -> Tensor | None:
        tokens = x[..., 0].numel()
        return None if (len(self.A) - 1) * tokens > FEW else x[..., None, :] * self.A  # [.. r, d_in]

    def output(self, z: Tensor, x: Tensor, base: Base) -> Tensor:
        y = (z * self.B.T).sum(-2)
        return y if base.bias is None else y + (1 - self.B.sum(1)) * base.bias
