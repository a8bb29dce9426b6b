"""Pruning by size: step 1 of TIES, Yadav et al. 2023, arXiv:2306.01708, and the weighted sum of what is left.

    M_i' = M_i at the int(density n) largest of its n entries by size, 0 elsewhere        M = sum_i w_i M_i'

The paper takes the largest entries of all layers together; here each layer keeps its share, as in PEFT and mergekit.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.rules.base import Rule, RuleConfig, weighted_sum
from graftlm.combine.spaces import OF_PRODUCTS
from graftlm.config.schema import Weight, config


def keep_largest(M: Tensor, count: int) -> Tensor:
    """M with zeros in the place of all but the `count` largest entries by size."""
    return M if count >= M.numel() else entries_at(M, M.abs().flatten().topk(count, sorted=False).indices)


def entries_at(M: Tensor, places: Tensor) -> Tensor:
    """M with zeros in the place of all entries but those with these numbers, of M laid out flat."""
    sparse = torch.zeros_like(M)
    sparse.view(-1)[places] = M.flatten()[places]
    return sparse


@config
class MagnitudeConfig(RuleConfig):
    name: Literal["magnitude"] = "magnitude"
    density: Weight = 0.5
    """The share of the entries that is kept."""


class Magnitude(Rule):
    paper = "Yadav et al. 2023, arXiv:2306.01708"
    spaces = (*OF_PRODUCTS, "factors")

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        sparse = [keep_largest(M, int(self.config.density * M.numel())) for M in matrices]
        return weighted_sum(sparse, weights)
