"""Model Breadcrumbs: Davari and Belilovsky 2023, arXiv:2312.06795, section 3.

    M_i' = M_i without its int(gamma n) largest entries by size, and without the smallest, so that int(density n) of its
           n entries are left        M = sum_i w_i M_i'

The largest entries are outliers there, the smallest noise. gamma = 0 is pruning by size alone. `combine: ties` takes
the mean of the entries that agree on a sign (`fuse.py`) in place of the sum.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from graftlm.combine.rules.base import Rule, RuleConfig
from graftlm.combine.rules.fuse import Combine, fuse
from graftlm.combine.rules.magnitude import entries_at
from graftlm.config.schema import Share, Weight, config


def keep_middle(M: Tensor, density: float, gamma: float) -> Tensor:
    """M with zeros in the place of all entries but int(density n) below the int(gamma n) largest ones."""
    n = M.numel()
    stop = n - int(gamma * n)
    return entries_at(M, M.abs().flatten().argsort()[max(0, stop - int(density * n)) : stop])


@config
class BreadcrumbsConfig(RuleConfig):
    name: Literal["breadcrumbs"] = "breadcrumbs"
    density: Weight = 0.9
    """The share of the entries that is kept."""
    gamma: Share = 0.01
    """The share of the largest entries, which are left out."""
    combine: Combine = "sum"
    """What is made of the entries that are kept: their weighted sum, or TIES's mean."""

    @model_validator(mode="after")
    def _shares(self) -> "BreadcrumbsConfig":
        if self.density + self.gamma > 1 + 1e-9:
            raise ValueError(
                f"density {self.density} + gamma {self.gamma} is more than 1: they are shares of one whole"
            )
        return self


class Breadcrumbs(Rule):
    paper = "Davari and Belilovsky 2023, arXiv:2312.06795"

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        sparse = [keep_middle(M, self.config.density, self.config.gamma) for M in matrices]
        return fuse(sparse, weights, self.config.combine, self.convention)
