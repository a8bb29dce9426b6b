"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8): answers that were liked or not, without pairs.

With r(y) = log pi(y|x) / pi_ref(y|x) [N] and the reference point z0 = max(0, mean of r over mismatched answers):

    L = d (1 - s(beta (r(y) - z0)))  if y was liked,   u (1 - s(beta (z0 - r(y))))  if not        over N answers

z0 estimates the KL divergence between policy and reference. A mismatched answer is the answer to another prompt: the
one of the next row of the step. z0 has no gradient and is one number for the whole step, whatever its packs and ranks:
it is measured before the passes that learn (`statistic`), where TRL takes the mean of each device's own batch.

scores [N]: 1 liked, 0 not liked. Pairs may be given too; each is one answer that was liked and one that was not.
"""

from typing import Literal

import torch
from torch import Tensor

from graftlm.config.schema import PositiveRate, config
from graftlm.losses.base import Batch, ComparedConfig, LossSum, answers, log_ratios, per_answer


@config
class KtoConfig(ComparedConfig):
    name: Literal["kto"] = "kto"
    beta: PositiveRate = 0.1
    liked: PositiveRate = 1.0
    """The weight of answers that were liked. Give the rarer kind the larger weight: the paper advises a ratio such that
    weight times number is from 1 to 4/3 times as large for those that were liked."""
    not_liked: PositiveRate = 1.0
    """The weight of answers that were not liked."""


def value(config: KtoConfig, policy: Tensor, reference: Tensor | None, batch: Batch) -> LossSum:
    ratios = log_ratios(policy, reference, batch)
    liked = batch.scores > 0.5
    gain = config.beta * (ratios - max(0.0, batch.statistic))
    losses = torch.where(liked, config.liked * (-gain).sigmoid(), config.not_liked * gain.sigmoid())
    count = answers(config, batch)
    metrics = feedback_metrics(policy, config.beta * ratios, batch)
    metrics["kl"] = (count * max(0.0, batch.statistic), count)
    return LossSum(losses.sum(), count, metrics)


def divergence(config: KtoConfig, policy: Tensor, reference: Tensor | None, batch: Batch) -> LossSum:
    """The part of z0 that one pack of mismatched answers is."""
    return LossSum(log_ratios(policy, reference, batch).sum(), answers(config, batch))


def feedback_metrics(policy: Tensor, rewards: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean rewards and log-probabilities of liked (chosen) and not liked (rejected) answers: rewards [N]."""
    with torch.no_grad():
        liked = (batch.scores > 0.5).to(policy.dtype)
        sums = per_answer(policy, batch)
        found = {}
        for name, mask in (("chosen", liked), ("rejected", 1 - liked)):
            found[f"{name}_reward"] = ((rewards * mask).sum(), mask.sum())
            found[f"{name}_log_prob"] = ((sums * mask).sum(), mask.sum())
        return found
