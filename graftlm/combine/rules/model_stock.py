"""Model Stock: Jang et al. 2024, arXiv:2403.19522, equation 7.

    M = t sum_i w_i M_i        t = N c / (1 + (N - 1) c)        c the mean of cos(M_i, M_j) over pairs, sum w_i = 1

t is near 1 where the N changes agree, and 0 where they are orthogonal. Of changes that oppose each other (c < 0) the
formula makes t negative and, near c = -1 / (N - 1), as large as one likes: N = 3 and c = -0.4 give t = -6. Here t is
held to [0, 1]. Rotations keep c, so every space of products gives the same.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.rules.base import Rule, RuleConfig, weighted_sum
from graftlm.config.schema import config


def share_of_mean(matrices: Sequence[Tensor]) -> float:
    """t, in [0, 1]."""
    pairs = list(combinations(matrices, 2))
    if not pairs:
        return 1.0
    cosines = [float((M * N).sum() / (M.norm() * N.norm()).clamp_min(1e-300)) for M, N in pairs]
    count, c = len(matrices), max(0.0, sum(cosines) / len(cosines))
    return min(1.0, count * c / (1 + (count - 1) * c))


@config
class ModelStockConfig(RuleConfig):
    name: Literal["model-stock"] = "model-stock"


class ModelStock(Rule):
    paper = "Jang et al. 2024, arXiv:2403.19522"
    relative = True

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        return share_of_mean(matrices) * weighted_sum(matrices, weights)
