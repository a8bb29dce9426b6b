"""Task arithmetic: Ilharco et al. 2023, arXiv:2212.04089, section 2.

    M = sum_i w_i M_i

On products this is the concatenation of the factors, A = [A_1; ..], B = [w_1 s_1 B_1, ..], at the smallest rank that
holds it: exact, with negative weights and different ranks too. (On factors, where PEFT's `linear` acts, the sum has
products of one adapter's A with another's B: `peft_linear.py`.)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.rules.base import Rule, RuleConfig, weighted_sum
from graftlm.config.schema import config


@config
class LinearConfig(RuleConfig):
    name: Literal["linear"] = "linear"


class Linear(Rule):
    paper = "Ilharco et al. 2023, arXiv:2212.04089"

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        return weighted_sum(matrices, weights)
