"""DARE: Yu et al. 2023, arXiv:2311.03099, section 3.

    M_i' = Z_i M_i / p        Z_i ~ Bernoulli(p) for each entry, p = density        E[M_i'] = M_i

Then the weighted sum of the M_i', or TIES's mean of the entries that agree on a sign (`combine: ties`). The conventions
differ in `combine: ties` (`fuse.py`; mergekit does not divide), and in one more point: mergekit multiplies by
||M_i||_1 / ||Z_i M_i||_1 in place of 1 / p. This keeps the sum of the sizes, and the mean of M_i' is not M_i.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.rules.base import PositiveShare, Rule, RuleConfig
from graftlm.combine.rules.fuse import Combine, fuse
from graftlm.combine.spaces import OF_PRODUCTS
from graftlm.config.schema import config


def drop(M: Tensor, keep: Tensor, generator: torch.Generator, *, same_sum: bool = False) -> Tensor:
    """M with each entry kept with its probability, and divided by it; `same_sum`: with ||M||_1 restored instead."""
    mask = torch.bernoulli(keep, generator=generator).to(M.dtype)
    if not same_sum:
        return M * mask / keep.to(M.dtype)
    before, after = M.abs().sum(), (M * mask).abs().sum()
    return M * mask * (before / after if after > 0 else 1.0)


@config
class DareConfig(RuleConfig):
    name: Literal["dare"] = "dare"
    density: PositiveShare = 0.5
    """The probability with which an entry is kept."""
    combine: Combine = "sum"
    """What is made of the entries that are kept: their weighted sum, or TIES's mean."""


class Dare(Rule):
    paper = "Yu et al. 2023, arXiv:2311.03099"
    spaces = (*OF_PRODUCTS, "factors")
    conventions = ("paper", "peft", "mergekit")

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        sparse = list(matrices)
        if self.config.density < 1:
            like_mergekit = self.convention == "mergekit"
            keep = torch.full(matrices[0].shape, self.config.density)  # float32, as PEFT draws
            sparse = [drop(M, keep, generator, same_sum=like_mergekit) for M in matrices]
        return fuse(sparse, weights, self.config.combine, self.convention, divide=False)
