"""TIES: Yadav et al. 2023, arXiv:2306.01708, section 3 and algorithm 1.

    M_i' = M_i at the int(density n) largest of its n entries by size, 0 elsewhere        trim
    g = sgn(sum_i w_i M_i')                                                               elect
    M = scale (sum_{i agrees} w_i M_i') / (sum_{i agrees} |w_i|)                          merge the entries of that sign

The weights and the conventions of elect and merge are those of `fuse.py`. The paper trims all layers together; here
each layer keeps its share, as in PEFT and mergekit. mergekit keeps one entry at least.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.rules.base import Convention, Rule, RuleConfig
from graftlm.combine.rules.fuse import Majority, fuse
from graftlm.combine.rules.magnitude import keep_largest
from graftlm.combine.spaces import OF_PRODUCTS
from graftlm.config.schema import PositiveRate, Weight, config


@config
class TiesConfig(RuleConfig):
    name: Literal["ties"] = "ties"
    density: Weight = 0.2
    """The share of the entries that is kept; the paper's default."""
    majority: Majority = "total"
    """Whether entries vote on the sign by their size (the paper) or by their number."""
    scale: PositiveRate = 1.0
    """The paper's lambda, which it chooses on held-out rows."""


class Ties(Rule):
    paper = "Yadav et al. 2023, arXiv:2306.01708"
    spaces = (*OF_PRODUCTS, "factors")
    conventions = ("paper", "peft", "mergekit")

    def __init__(self, config: TiesConfig, convention: Convention | None = None) -> None:
        super().__init__(config, convention)
        self.scale = config.scale

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        least = 1 if self.convention == "mergekit" and self.config.density else 0
        sparse = [keep_largest(M, max(least, int(self.config.density * M.numel()))) for M in matrices]
        return fuse(sparse, weights, "ties", self.convention, majority=self.config.majority)
