"""DPOP, or DPO-Positive (Pal et al. 2024, arXiv:2402.13228, equation 3): DPO that keeps the chosen answer likely.

With r(y) = log pi(y|x) / pi_ref(y|x) [N]:

    L = -log s( beta ( r(y_w) - r(y_l) - lambda max(0, -r(y_w)) ) )        over P pairs

DPO is content when the rejected answer falls faster than the chosen one; here a chosen answer that becomes less likely
than under the reference costs lambda times as much as the margin gains.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.config.schema import PositiveRate, config
from graftlm.losses.base import Batch, ComparedConfig, LossSum, log_ratios, of_pairs, pair_metrics, pairs


@config
class DpopConfig(ComparedConfig):
    name: Literal["dpop"] = "dpop"
    beta: PositiveRate = 0.3
    penalty: PositiveRate = 50.0
    """lambda: what a nat that the chosen answer loses against the reference costs, in nats of margin."""


def value(config: DpopConfig, policy: Tensor, reference: Tensor | None, batch: Batch) -> LossSum:
    ratios = log_ratios(policy, reference, batch)
    chosen, rejected = of_pairs(ratios, batch)
    losses = -F.logsigmoid(config.beta * (chosen - rejected - config.penalty * torch.relu(-chosen)))
    return LossSum(losses.sum(), pairs(config, batch), pair_metrics(policy, config.beta * ratios, batch))
