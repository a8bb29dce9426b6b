"""Diff pruning. Guo, Rush and Kim 2020, arXiv:2012.07463, sections 3.1 to 3.3.

    dW = z_g z * w                                    w [d_out, d_in], at first 0; z like w; z_g one gate for all of W
    z = clamp(l + (h - l) sigmoid(logit u + alpha))   hard-concrete gate in 0 .. 1: l = -1.5, h = 1.5, u uniform noise
    penalty = sparsity * sum_i P(z_i > 0) P(z_g > 0)  the expected number of entries that differ from the base
    P(z > 0) = sigmoid(alpha - log(-l / h))

z_g is the paper's structured variant, with a matrix as the group. The noise is drawn anew in each training pass; where
no gradient is wanted there is none (the test-time gate of Louizos et al. 2017, arXiv:1712.01312). The authors train
the gates with a learning rate of 0.1, far above that of w: here alpha = gate + gate_speed * a, and a learns at the rate
of w, which for Adam is the same thing. Their code adds up the two probabilities in the penalty; the paper multiplies
them, and so do we. Magnitude pruning to a fixed share of entries, and training on with that mask, is the callback
`diff-pruning`.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Flag, PositiveRate, Rate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site

LOW, HIGH = -1.5, 1.5


@config
class DiffPruningConfig(DeltaConfig):
    method: Literal["diff-pruning"] = "diff-pruning"
    sparsity: Rate = 1.25e-7
    """What each entry that is expected to be open adds to the loss, in nats a token."""
    gate: Rate = 5.0
    """alpha at the start: the higher, the longer the gates stay open."""
    gate_speed: PositiveRate = 200
    """How many times as fast as w the gates learn: 0.1 / 5e-4."""
    structured: Flag = True


class DiffPruning(AdditiveDelta):
    family = "specification"
    paper = "Guo, Rush and Kim 2020, arXiv:2012.07463"
    callbacks = ("diff-pruning",)
    formula = "2 * d_in * d_out + structured"
    learning_rate = 0.000125
    kinds = ("linear", "embedding")

    def __init__(self, site: Site, config: DiffPruningConfig) -> None:
        super().__init__(site, config)
        self.gate, self.gate_speed, self.sparsity = config.gate, config.gate_speed, config.sparsity
        self.w = nn.Parameter(torch.zeros(site.d_out, site.d_in))
        self.a = nn.Parameter(torch.zeros(site.d_out, site.d_in))
        self.a_group = nn.Parameter(torch.zeros(1)) if config.structured else None

    def matrix(self) -> Tensor:
        z = self._gate(self.a)
        return (z if self.a_group is None else z * self._gate(self.a_group)) * self.w

    def penalty(self) -> Tensor:
        opened = self._is_open(self.a).sum()
        return self.sparsity * (opened if self.a_group is None else opened * self._is_open(self.a_group).sum())

    def _alpha(self, a: Tensor) -> Tensor:
        return self.gate + self.gate_speed * a

    def _gate(self, a: Tensor) -> Tensor:
        alpha = self._alpha(a)
        if self.training and torch.is_grad_enabled():
            alpha = alpha + torch.rand_like(alpha).logit(eps=1e-4)  # the authors keep u this far from 0 and 1
        return (LOW + (HIGH - LOW) * alpha.sigmoid()).clamp(0, 1)

    def _is_open(self, a: Tensor) -> Tensor:
        return (self._alpha(a) - math.log(-LOW / HIGH)).sigmoid()
