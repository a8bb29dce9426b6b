"""SimPO (Meng et al. 2024, arXiv:2405.14734, equation 6): the mean log-probability of a token is the reward.

    L = -log s( beta log pi(y_w|x) / |y_w| - beta log pi(y_l|x) / |y_l| - gamma )        over P pairs

No reference: |y| [N] takes its place in keeping long answers from winning by their length.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from graftlm.config.schema import PositiveRate, Rate, config
from graftlm.losses.base import Batch, LossConfig, LossSum, lengths, of_pairs, pair_metrics, pairs, per_answer


@config
class SimpoConfig(LossConfig):
    name: Literal["simpo"] = "simpo"
    beta: PositiveRate = 2.0
    gamma: Rate = 1.0
    """The margin that is aimed at; the paper tunes gamma / beta and finds 0.5 good for most models."""


def value(config: SimpoConfig, policy: Tensor, reference: Tensor | None, batch: Batch) -> LossSum:
    rewards = config.beta * per_answer(policy, batch) / lengths(batch, policy)
    chosen, rejected = of_pairs(rewards, batch)
    losses = -F.logsigmoid(chosen - rejected - config.gamma)
    return LossSum(losses.sum(), pairs(config, batch), pair_metrics(policy, rewards, batch))
