"""Iso-C: Marczak et al. 2025, arXiv:2502.04959, section 4.1.

    sum_i w_i M_i = P S Q^T        M = mean(S) P Q^T

A flat spectrum: directions that few adapters share count as much as common ones. The paper takes the mean over
min(m, n) singular values; a sum of LoRAs has fewer, and the vectors of the others are not determined, so here it is the
mean over those above 0. So one adapter is not itself here: its spectrum becomes flat. Every space of products gives the
same.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.core import numerical_rank
from graftlm.combine.rules.base import Rule, RuleConfig, weighted_sum
from graftlm.config.schema import config


@config
class IsoCConfig(RuleConfig):
    name: Literal["iso-c"] = "iso-c"


class IsoC(Rule):
    paper = "Marczak et al. 2025, arXiv:2502.04959"

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        total = weighted_sum(matrices, weights)
        P, S, Qh = torch.linalg.svd(total, full_matrices=False)
        r = numerical_rank(S)
        flat: Tensor = S[:r].mean() * P[:, :r] @ Qh[:r]
        return flat
