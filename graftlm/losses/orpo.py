"""ORPO (Hong et al. 2024, arXiv:2403.07691, equations 4, 6 and 7): supervised training and an odds ratio in one step.

With the mean log-probability of a token a(y) = log pi(y|x) / |y| [N], and odds(y) = e^a(y) / (1 - e^a(y)):

    L = -a(y_w) - lambda log s( log odds(y_w) - log odds(y_l) )        over P pairs

No reference. The mean over pairs is the paper's; TRL takes the first part as a mean over all tokens of the batch, those
of prompts included.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.config.schema import PositiveRate, config
from graftlm.losses.base import Batch, LossConfig, LossSum, lengths, of_pairs, pair_metrics, pairs, per_answer


@config
class OrpoConfig(LossConfig):
    name: Literal["orpo"] = "orpo"
    weight: PositiveRate = 0.1
    """lambda: of the odds ratio, against the likelihood of the chosen answer."""


def value(config: OrpoConfig, policy: Tensor, reference: Tensor | None, batch: Batch) -> LossSum:
    means = per_answer(policy, batch) / lengths(batch, policy)
    chosen, rejected = of_pairs(means, batch)
    losses = -chosen - config.weight * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    return LossSum(losses.sum(), pairs(config, batch), pair_metrics(policy, means, batch))


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0, as exact near p = 1 as near p = 0. A p that rounds to 1 counts as the largest
    number below 1."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))
