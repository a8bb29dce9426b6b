"""Supervised training, and continued pretraining, which is the same sum over another choice of tokens.

    L = sum_i w_i ( -(1 - e) log pi(target_i) - e/V sum_v log pi(v) + z log^2 Z_i ) / sum_i w_i

policy log pi and weights w float [S], V the size of the vocabulary, Z_i = sum_v exp(logit_v). Raw text trains all its
tokens; the answers of conversations are what the mask says.

e is `label_smoothing` (Szegedy et al. 2016, arXiv:1512.00567, section 7), z is `z_loss`, which keeps logits from
drifting (Chowdhery et al. 2022, arXiv:2204.02311, section 5, with 1e-4). Both are 0 unless asked for.
"""

from typing import Literal

from torch import Tensor

from graftlm.config.schema import Rate, Share, config
from graftlm.losses.base import Batch, LossConfig, LossSum, Reading, tokens


@config
class ImitationConfig(LossConfig):
    label_smoothing: Share = 0.0
    """The part of each token's weight that is spread evenly over the whole vocabulary."""
    z_loss: Rate = 0.0
    """The weight of the squared logarithm of the softmax's denominator; 1e-4 is usual."""

    @property
    def reads(self) -> tuple[Reading, ...]:
        weights: dict[Reading, float] = {"mean_log_probs": self.label_smoothing, "normalisers": self.z_loss}
        return tuple(name for name, weight in weights.items() if weight)


@config
class SupervisedConfig(ImitationConfig):
    name: Literal["supervised"] = "supervised"


@config
class PretrainingConfig(ImitationConfig):
    name: Literal["pretraining"] = "pretraining"


def value(
    config: SupervisedConfig | PretrainingConfig, policy: Tensor, reference: Tensor | None, batch: Batch
) -> LossSum:
    count, imitation = tokens(config, batch), -(batch.weights * policy).sum()
    if not config.reads:
        return LossSum(imitation, count)
    found = (1 - config.label_smoothing) * imitation
    if config.label_smoothing:
        assert batch.mean_log_probs is not None, "label smoothing needs the mean over the vocabulary"
        found = found - config.label_smoothing * (batch.weights * batch.mean_log_probs).sum()
    if config.z_loss:
        assert batch.normalisers is not None, "z-loss needs the softmax's denominators"
        found = found + config.z_loss * (batch.weights * batch.normalisers.square()).sum()
    return LossSum(found, count, {"supervised_loss": (imitation.detach(), count)})
