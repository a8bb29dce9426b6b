"""SCE of FuseChat: Wan et al. 2024, arXiv:2408.07990, section 3.3 (select, calculate, erase).

    select      only the entries with the largest variance over the adapters, a share `density` of those that vary
    calculate   c_i = w_i mean(M_i^2) / sum_j w_j mean(M_j^2) over the selected entries
    erase       M = (sum_{i agrees} c_i M_i) / (sum_{i agrees} c_i)        i agrees: sgn(M_i) = sgn(sum_j M_j)

The paper has no weights w_i. Where nothing varies (one adapter, or equal ones) the paper selects nothing; here all
entries are selected then, so that one adapter is itself.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.rules.base import Rule, RuleConfig
from graftlm.combine.rules.magnitude import keep_largest
from graftlm.config.schema import Weight, config


@config
class SceConfig(RuleConfig):
    name: Literal["sce"] = "sce"
    density: Weight = 0.1
    """The share of the entries that vary which is kept; the paper's default."""


class Sce(Rule):
    paper = "Wan et al. 2024, arXiv:2408.07990"
    relative = True

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        stacked = torch.stack(list(matrices))
        variance = stacked.var(0, unbiased=False)
        if varying := int(variance.count_nonzero()):
            stacked = stacked * (keep_largest(variance, int(self.config.density * varying)) > 0)
        c = torch.tensor(weights, dtype=stacked.dtype) * stacked.square().mean((1, 2))
        agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
        shares = c[:, None, None] * agrees
        total = shares.sum(0)
        return (shares * stacked).sum(0) / torch.where(total > 0, total, 1.0)
