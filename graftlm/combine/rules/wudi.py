"""WUDI: Cheng et al. 2025, arXiv:2503.08099, in closed form.

    min_M sum_i ||(M - w_i M_i) N_i^T||^2 + ridge sum_i ||M - w_i M_i||^2        N_i = M_i / ||M_i||
    M (sum_i G_i) = sum_i w_i M_i G_i        G_i = N_i^T N_i + ridge I

The rows of M_i stand for the inputs of adapter i, which the paper shows for the updates of a linear layer. So this is
RegMean (Jin et al. 2022, arXiv:2212.09849) without data. Where the row spaces are independent (sum_i r_i <= d_in) and
`ridge` is 0, the first sum is 0: on its own inputs, each adapter i is exactly w_i times itself. Every space of products
gives the same.

Departures. Public code takes 300 steps of Adam and stops early; we solve. Where row spaces nearly coincide, as those of
adapters from one random start do, the exact solution is as large as the differences of the rows are small.
Steps that stop early hide this; `ridge` bounds it: at ridge -> infinity M is the mean of the w_i M_i. The paper has no
weights; here a weight scales its adapter, so weight -1 subtracts it on its own inputs, and weight 0 leaves it out.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.core import ROUNDING
from graftlm.combine.rules.base import Rule, RuleConfig, weighted_sum
from graftlm.config.schema import Rate, config


@config
class WudiConfig(RuleConfig):
    name: Literal["wudi"] = "wudi"
    ridge: Rate = 1e-3
    """What is added to the diagonal of each G_i, whose trace is 1. 0: the exact minimum."""


class Wudi(Rule):
    paper = "Cheng et al. 2025, arXiv:2503.08099"

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        # As least squares, rather than with the G_i: these would square the condition number.
        units = [M / M.norm().clamp_min(1e-300) for M in matrices]
        wanted = [w * N @ M.T for M, N, w in zip(matrices, units, weights, strict=True)]
        if self.config.ridge > 0:  # n rows sqrt(ridge) I with the targets w_i M_i are one with the targets' mean
            root = (len(matrices) * self.config.ridge) ** 0.5
            units.append(root * torch.eye(matrices[0].shape[1], dtype=matrices[0].dtype))
            wanted.append(root * weighted_sum(matrices, weights).T / len(matrices))
        solved: Tensor = torch.linalg.lstsq(
            torch.cat(units), torch.cat(wanted), rcond=ROUNDING, driver="gelsd"
        ).solution
        return solved.T
