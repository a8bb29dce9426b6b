"""Policy gradients against the baseline of a group: several answers to one prompt, each with a reward.

RLOO (Ahmadian et al. 2024, arXiv:2402.14740), GRPO (Shao et al. 2024, arXiv:2402.03300, equation 3), Dr. GRPO (Liu et
al. 2025, arXiv:2503.20783), GSPO (Zheng et al. 2025, arXiv:2507.18071) are one equation:

    rho = pi(token) / pi_before(token)                        by token [S], or of the whole answer [N]
    L   = -min( rho A, clip(rho, 1 - low, 1 + high) A ) + kl (q - log q - 1),   q = pi_ref(token) / pi(token)

scores [N] are the advantages A (`advantages`), old_log_probs [S] the log-probabilities under the policy that sampled
the answers. ratio: `token` is GRPO; `answer` is RLOO with the product over the answer's tokens, and `answer-mean` is
GSPO with its |y|-th root. divide: `answers` is the mean over answers of the mean over their tokens (GRPO), `tokens` the
mean
over all tokens of the step (DAPO, arXiv:2503.14476), `constant` the mean over answers of the sum over their tokens by
one number for all, `length` (Dr. GRPO, section 3.2 and its code, which takes the longest answer that generation may
give: `rl.max_new_tokens`). What is a sum over a whole answer is not divided by its length.

    Dr. GRPO    {ratio: token, baseline: mean, divide: constant, length: max_new_tokens}
"""

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from graftlm.config.schema import PositiveCount, PositiveRate, Rate, config
from graftlm.losses.base import Batch, ComparedConfig, LossSum, lengths, per_answer
from graftlm.losses.base import answers as count_answers
from graftlm.losses.base import tokens as count_tokens


@config
class PolicyGradientConfig(ComparedConfig):
    name: Literal["policy-gradient"] = "policy-gradient"
    ratio: Literal["token", "answer", "answer-mean"] = "token"
    """What is compared with the policy that sampled: each token, the whole answer, or its mean token."""
    divide: Literal["answers", "tokens", "constant"] = "answers"
    """By what the losses of tokens are divided: the tokens of their answer and the answers of the step (GRPO), the
    tokens of the step (DAPO), or `length` and the answers of the step (Dr. GRPO). The last two need ratio token."""
    length: PositiveCount | None = None
    """The number of `divide: constant`; in Dr. GRPO `rl.max_new_tokens`."""
    low: PositiveRate = 0.2
    high: PositiveRate = 0.2
    baseline: Literal["leave-one-out", "mean", "standardised"] = "standardised"
    """What `rl` makes of rewards: each less the mean of the other answers to its prompt (RLOO), less that of all
    of them (Dr. GRPO, with `divide: constant`), or that over their standard deviation (GRPO)."""
    kl: Rate = 0.0
    """The weight of the divergence from the reference; 0 needs no reference."""

    @model_validator(mode="after")
    def _answers_are_whole(self) -> "PolicyGradientConfig":
        if self.divide != "answers" and self.ratio != "token":
            raise ValueError(
                f"divide: {self.divide} is for ratio: token; ratio {self.ratio} has one number for an answer"
            )
        if self.divide == "constant" and self.length is None:
            raise ValueError("divide: constant needs `length`, the tokens to divide by (Dr. GRPO: max_new_tokens)")
        if self.divide != "constant" and self.length is not None:
            raise ValueError(f"length is for divide: constant; divide: {self.divide} does not read it")
        return self

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0


def value(config: PolicyGradientConfig, policy: Tensor, reference: Tensor | None, batch: Batch) -> LossSum:
    before = policy.detach() if batch.old_log_probs is None else batch.old_log_probs
    size = lengths(batch, policy)
    divisor = {"answers": size, "tokens": torch.ones_like(size), "constant": torch.full_like(size, config.length or 1)}
    by = divisor[config.divide]
    if config.ratio == "token":
        of_token = _clipped(config, policy - before, batch.scores[batch.answers])
        losses = per_answer(of_token, batch) / by
    else:
        change = per_answer(policy - before, batch)
        losses = _clipped(config, change / size if config.ratio == "answer-mean" else change, batch.scores)
    metrics = {"kl": (policy.new_zeros(()), count_answers(config, batch))}
    if config.kl:
        assert reference is not None, "a divergence from the reference needs its log-probabilities"
        q = reference - policy
        divergence = per_answer(q.exp() - q - 1, batch) / by
        losses = losses + config.kl * divergence
        metrics = {"kl": (divergence.detach().sum(), count(config, batch))}
    return LossSum(losses.sum(), count(config, batch), metrics)


def count(config: PolicyGradientConfig, batch: Batch) -> Tensor:
    return count_tokens(config, batch) if config.divide == "tokens" else count_answers(config, batch)


def _clipped(config: PolicyGradientConfig, change: Tensor, advantage: Tensor) -> Tensor:
    rho = change.exp()
    return -torch.minimum(rho * advantage, rho.clamp(1 - config.low, 1 + config.high) * advantage)


def advantages(rewards: Tensor, groups: Tensor, kind: Literal["leave-one-out", "mean", "standardised"]) -> Tensor:
    """What each answer's reward [N] has over its group's; groups int64 [N] says which answers have one prompt.

    leave-one-out: minus the mean of the group's other answers (RLOO); mean: minus the mean of the group (Dr. GRPO);
    standardised: that over the group's standard deviation (GRPO). A group of one has no baseline: 0.
    """
    rewards = rewards.double()
    number = int(groups.max()) + 1 if len(groups) else 0
    size = torch.bincount(groups, minlength=number)[groups].double()
    centred = rewards - _group_sum(rewards, groups, number) / size
    others = (size - 1).clamp(min=1)
    if kind == "leave-one-out":
        centred = centred * size / others
    elif kind == "standardised":
        deviation = (_group_sum(centred.square(), groups, number) / others).sqrt()
        centred = centred / (deviation + 1e-4)
    return centred.float()


def _group_sum(values: Tensor, groups: Tensor, number: int) -> Tensor:
    return values.new_zeros(number).index_add(0, groups, values)[groups]
