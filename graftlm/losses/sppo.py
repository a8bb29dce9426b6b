"""SPPO (Wu et al. 2024, arXiv:2405.00675, equation 4.7): self-play as regression on the share of wins.

    L = ( log pi(y|x) / pi_ref(y|x) - eta (P(y) - 1/2) )^2        over N answers

scores [N]: P(y), the share of comparisons with the reference's own answers that y wins, as a judge estimates it; of a
pair, 1 for the chosen answer and 0 for the rejected one. The mean over answers is the paper's; TRL (`sppo_hard`) adds
up the two of a pair, so its loss is twice this. pi_ref is the policy of the iteration before.
"""

from typing import Literal

from torch import Tensor

from graftlm.config.schema import PositiveRate, config
from graftlm.losses.base import Batch, ComparedConfig, LossSum, answers, log_ratios
from graftlm.losses.kto import feedback_metrics


@config
class SppoConfig(ComparedConfig):
    name: Literal["sppo"] = "sppo"
    eta: PositiveRate = 1000.0
    """How far a certain win moves an answer: its log-ratio is drawn to eta / 2."""


def value(config: SppoConfig, policy: Tensor, reference: Tensor | None, batch: Batch) -> LossSum:
    ratios = log_ratios(policy, reference, batch)
    losses = (ratios - config.eta * (batch.scores.to(ratios.dtype) - 0.5)).square()
    return LossSum(losses.sum(), answers(config, batch), feedback_metrics(policy, ratios / config.eta, batch))
