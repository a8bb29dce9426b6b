"""ReFT: Representation Finetuning for Language Models. Wu et al. 2024, arXiv:2404.03592, equations 2 and 3.

    h' = h + R^T (W h + b - R h)        LoReFT: R [r, d_model] with orthonormal rows  W [r, d_model]  b [r]
    h' = h + R^T (W h + b)              DiReFT: the same without - R h, and R is any matrix

h [.., d_model] is the residual stream behind a transformer layer. LoReFT sets what h has in the r directions of R to
W h + b and leaves the rest of h alone.

Departures. The paper changes the first f and the last l positions of the prompt; here it is every position, answers
included. The last positions of a prompt cannot be found from a row alone: during generation a row is read token by
token, and in training it may be packed with others. R is kept as any matrix P and made orthonormal in each step,
P^T = Q S, R = Q^T (QR with a positive diagonal of S); the authors' pyreft has another parametrization of the same
matrices. The new delta is the identity: R is random, W starts at R (DiReFT: at 0) and b at 0, where the authors start W
as a linear layer.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import Base, Delta, DeltaConfig, Site, Targets
from graftlm.deltas.linalg import orthonormal
from graftlm.errors import TargetError


@config
class ReftConfig(DeltaConfig):
    method: Literal["reft"] = "reft"
    r: PositiveCount = 8
    form: Literal["loreft", "direft"] = "loreft"
    targets: Targets = "all-blocks"


class Reft(Delta):
    family = "addition"
    paper = "Wu et al. 2024, arXiv:2404.03592"
    formula = "2 * r * d_out + r"
    learning_rate = 2e-3
    kinds = ("block",)
    not_mergeable = "it changes the residual stream behind a layer, which is the output of no single weight"

    def __init__(self, site: Site, config: ReftConfig) -> None:
        super().__init__(site, config)
        if config.r > site.d_out:
            raise TargetError(
                f"reft: r is {config.r}, and {site.name} has {site.d_out} directions: make it smaller",
                code="rank-too-large",
            )
        self.form = config.form
        R = orthonormal(torch.randn(site.d_out, config.r, generator=site.generator())).T.contiguous()
        self.P = nn.Parameter(R)
        self.W = nn.Parameter(R.clone() if self.form == "loreft" else torch.zeros_like(R))
        self.b = nn.Parameter(torch.zeros(config.r))

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        if self.form == "direft":
            return y + F.linear(y, self.W, self.b) @ self.P
        R = orthonormal(self.P.T).T
        return y + F.linear(y, self.W - R, self.b) @ R
