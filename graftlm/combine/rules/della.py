"""DELLA: Deep et al. 2024, arXiv:2406.11617, section 3 (MagPrune, elect, fuse).

    p_ij = density - epsilon + 2 epsilon (k_ij - 1) / (n - 1)        k_ij the rank of |M_ij| in row i, 1 the smallest
    M' = Z M / p        Z_ij ~ Bernoulli(p_ij)        E[M'] = M

Then the mean of the entries that agree on a sign (`fuse.py`), or their weighted sum (`combine: sum`). p is the
probability to keep; large entries are kept more often. A row of one entry has p = density, and density 1 keeps all.
mergekit multiplies by ||M||_1 / ||Z M||_1 in place of 1 / p, so that the mean of M' is not M; its row of one entry
fails (0.1.5).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from graftlm.combine.rules.base import PositiveShare, Rule, RuleConfig
from graftlm.combine.rules.dare import drop
from graftlm.combine.rules.fuse import Combine, fuse
from graftlm.config.schema import Share, config


def keep_probability(M: Tensor, density: float, epsilon: float) -> Tensor:
    """p [rows, columns], float32."""
    rank = M.abs().argsort(dim=1).argsort(dim=1).float()  # from 0
    last = M.shape[1] - 1
    return density - epsilon + 2 * epsilon * (rank / last if last else torch.full_like(rank, 0.5))


@config
class DellaConfig(RuleConfig):
    name: Literal["della"] = "della"
    density: PositiveShare = 0.5
    """The mean probability with which an entry is kept."""
    epsilon: Share = 0.15
    """How far the probability of the smallest and of the largest entry of a row is from `density`."""
    combine: Combine = "ties"
    """What is made of the entries that are kept: TIES's mean, or their weighted sum."""

    @model_validator(mode="after")
    def _probabilities(self) -> "DellaConfig":
        if self.density < 1 and not (self.density - self.epsilon > 0 and self.density + self.epsilon < 1):
            raise ValueError(
                f"density {self.density} -/+ epsilon {self.epsilon} must lie between 0 and 1: they are probabilities"
            )
        return self


class Della(Rule):
    paper = "Deep et al. 2024, arXiv:2406.11617"
    conventions = ("paper", "mergekit")

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        sparse, (density, epsilon) = list(matrices), (self.config.density, self.config.epsilon)
        if density < 1:
            like_mergekit = self.convention == "mergekit"
            sparse = [
                drop(M, keep_probability(M, density, epsilon), generator, same_sum=like_mergekit) for M in matrices
            ]
        return fuse(sparse, weights, self.config.combine, self.convention)
