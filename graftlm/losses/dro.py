"""DRO (Richemond et al. 2024, arXiv:2405.19107): single answers with a reward, by regression.

    L = ( r(x, y) - V(x) - tau log pi(y|x) / pi_ref(y|x) )^2 / 2        over N answers

The optimum of maximising reward under a KL divergence of weight tau makes the bracket zero for every answer, so no
pairs are needed. V(x) [N] is learnt with the policy: here a linear head on the policy's hidden state where the prompt
ends, whose gradient does not reach the policy; in the paper it is a network of its own. scores [N] are the rewards; of
feedback, 1 for an answer that was liked and 0 for one that was not.
"""

from typing import Literal

from torch import Tensor

from graftlm.config.schema import PositiveRate, config
from graftlm.losses.base import Batch, ComparedConfig, LossSum, answers, log_ratios
from graftlm.losses.kto import feedback_metrics


@config
class DroConfig(ComparedConfig):
    name: Literal["dro"] = "dro"
    tau: PositiveRate = 0.1
    """How much reward a nat of divergence from the reference is worth: the policy is held to it so strongly."""
    value_rate: PositiveRate = 1e-3
    """The largest learning rate of the value head."""


def value(config: DroConfig, policy: Tensor, reference: Tensor | None, batch: Batch) -> LossSum:
    assert batch.values is not None, "this objective needs the value of each prompt"
    rewards = config.tau * log_ratios(policy, reference, batch)
    losses = (batch.scores.to(rewards.dtype) - batch.values - rewards).square() / 2
    metrics = feedback_metrics(policy, rewards, batch)
    metrics["value"] = (batch.values.detach().sum(), answers(config, batch))
    return LossSum(losses.sum(), answers(config, batch), metrics)
