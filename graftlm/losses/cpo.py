"""CPO (Xu et al. 2024, arXiv:2401.08417, equations 3 to 5): DPO with a uniform reference, and likelihood of the chosen.

    L = -log s( beta (log pi(y_w|x) - log pi(y_l|x)) ) - alpha log pi(y_w|x) / |y_w|        over P pairs

The second part keeps the policy near the chosen answers. The paper writes it as a sum over the answer's tokens; its
program, and TRL, take a mean over all tokens of the batch. Here it is the mean over an answer's tokens, so that long
answers do not drown the margin and a step is the same however it is split.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from graftlm.config.schema import PositiveRate, Rate, config
from graftlm.losses.base import Batch, LossConfig, LossSum, lengths, of_pairs, pair_metrics, pairs, per_answer


@config
class CpoConfig(LossConfig):
    name: Literal["cpo"] = "cpo"
    beta: PositiveRate = 0.1
    alpha: Rate = 1.0
    """The weight of the chosen answer's likelihood; with 0 only the margin is left."""


def value(config: CpoConfig, policy: Tensor, reference: Tensor | None, batch: Batch) -> LossSum:
    sums = per_answer(policy, batch)
    chosen, rejected = of_pairs(sums, batch)
    of_token, _ = of_pairs(sums / lengths(batch, policy), batch)
    losses = -F.logsigmoid(config.beta * (chosen - rejected)) - config.alpha * of_token
    return LossSum(losses.sum(), pairs(config, batch), pair_metrics(policy, config.beta * sums, batch))
