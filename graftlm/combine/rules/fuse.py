"""Matrices, pruned or not, as one: their weighted sum, or the mean of the entries that agree on a sign.

TIES: Yadav et al. 2023, arXiv:2306.01708, section 3, steps 2 and 3.

    g = sgn(sum_i w_i M_i)        i agrees: sgn(w_i M_i) = g
    M = (sum_{i agrees} w_i M_i) / (sum_{i agrees} |w_i|)

Each entry by itself. The paper has no weights; these keep its meaning: the result is a mean, so weights matter by their
ratio and their sign. The sources differ:

    paper      as above; where the sum is 0, nothing agrees
    peft       g = sgn(sum_i M_i), a sum of 0 counts as positive; divides by the number of those that agree (0.21.2)
    mergekit   a sum of 0 counts as positive; divides by sum w_i of those that agree, or not at all (0.1.5): where it
               divides, one adapter with weight -1 is itself
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.rules.base import Convention, weighted_sum

Combine = Literal["sum", "ties"]
Majority = Literal["total", "frequency"]


def fuse(
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    combine: Combine,
    convention: Convention,
    *,
    majority: Majority = "total",
    divide: bool = True,
) -> Tensor:
    """`majority`: whether entries vote by size or by number. `divide`: whether mergekit divides."""
    if combine == "sum":
        return weighted_sum(matrices, weights)
    stacked = torch.stack(list(matrices))  # [n, rows, columns]
    w = torch.tensor(weights, dtype=stacked.dtype)[:, None, None]
    votes = stacked if convention == "peft" else w * stacked
    total = votes.sum(0) if majority == "total" else votes.sign().sum(0)
    sign = total.sign() if convention == "paper" else torch.where(total >= 0, 1.0, -1.0)
    agrees = (votes.sign() == sign) & (votes != 0)
    found = (w * stacked * agrees).sum(0)
    if convention == "paper":
        divisor = (w.abs() * agrees).sum(0)
    elif convention == "peft":
        divisor = agrees.sum(0).to(found)
    elif divide:
        divisor = (w * agrees).sum(0)
    else:
        return found
    return found / torch.where(divisor == 0, 1.0, divisor)
