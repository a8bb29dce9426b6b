"""SLERP: Shoemake 1985, "Animating rotation with quaternion curves", of two changes as vectors.

    M = sin((1 - t) h) / sin(h) M_1 + sin(t h) / sin(h) M_2        cos h = <M_1, M_2> / (||M_1|| ||M_2||)
    t = w_2 / (w_1 + w_2)

Of equal norms the norm is kept. Parallel and opposite changes have no such arc: (1 - t) M_1 + t M_2. Merging tools
apply it to whole weights, between which h is so small that it is the linear rule; here it is applied to changes.
Rotations keep <M_1, M_2>, so every space of products gives the same.
"""

from collections.abc import Sequence
from math import acos, sin
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.rules.base import Rule, RuleConfig, weighted_sum
from graftlm.config.schema import config

PARALLEL = 1e-6
"""sin h below which two changes count as parallel."""


@config
class SlerpConfig(RuleConfig):
    name: Literal["slerp"] = "slerp"


class Slerp(Rule):
    paper = "Shoemake 1985, SIGGRAPH 19(3)"
    relative = True
    most = 2

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        norms = [float(M.norm()) for M in matrices]
        if len(matrices) == 1 or 0 in norms:
            return weighted_sum(matrices, weights)
        cosine = float((matrices[0] * matrices[1]).sum()) / (norms[0] * norms[1])
        angle = acos(max(-1.0, min(1.0, cosine)))
        if sin(angle) < PARALLEL:
            return weighted_sum(matrices, weights)
        return weighted_sum(matrices, [sin(weight * angle) / sin(angle) for weight in weights])
