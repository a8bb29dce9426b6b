"""RegMean: Jin et al. 2022, arXiv:2212.09849, section 3.2.

    min_M sum_i tr((M - w_i M_i) G_i (M - w_i M_i)^T)        G_i = E[x x^T] over the inputs x of adapter i [d_in, d_in]
    M = (sum_i w_i M_i G_i) (sum_i G_i)^-1                   with the off-diagonals of G_i times `off_diagonal`

M answers as each adapter does on that adapter's own rows, in the sense of least squares. Equal G_i give the mean.

Spaces. `knots` and `product` have whole rows, and give M above. The rows of M_i G_i are not those of M_i, so `core` is
another result: the best M whose rows are combinations of the adapters' rows, for which it takes V^T G_i V. It is much
cheaper for wide layers.

Departures. The paper sums x x^T over rows, so an adapter with more rows counts for more; with the means that
`graftlm/passes/statistics.py` gathers, all count the same. Its x are the inputs in the model with adapter i, that
file's are those in the bare base. The paper has no weights; here a weight scales its adapter. Where the G_i leave M
undetermined, it is the mean of the w_i M_i.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.rules.base import MomentRule, RuleConfig, weighted_sum
from graftlm.config.schema import Weight, config

ROUNDING = torch.finfo(torch.float32).eps
"""Share of the largest eigenvalue of sum_i G_i below which another one is rounding: moments are float32."""


@config
class RegMeanConfig(RuleConfig):
    name: Literal["regmean"] = "regmean"
    off_diagonal: Weight = 0.9
    """What the off-diagonal entries of G_i are multiplied by; the paper's default."""


class RegMean(MomentRule):
    paper = "Jin et al. 2022, arXiv:2212.09849"
    spaces = ("knots", "product", "core", "ctm")

    def prepared(self, moment: Tensor) -> Tensor:
        share: float = self.config.off_diagonal
        return share * moment + (1 - share) * moment.diag().diag()

    def merge_with(self, matrices: Sequence[Tensor], weights: Sequence[float], moments: Sequence[Tensor]) -> Tensor:
        mean = weighted_sum(matrices, weights) / len(matrices)
        away = torch.zeros_like(mean)
        for M, weight, G in zip(matrices, weights, moments, strict=True):
            away += (weight * M - mean) @ G
        inverse: Tensor = torch.linalg.pinv(weighted_sum(moments, [1.0] * len(moments)), rtol=ROUNDING, hermitian=True)
        return mean + away @ inverse
