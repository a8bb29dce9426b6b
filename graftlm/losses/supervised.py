"""Supervised training, and continued pretraining, which is the same sum over another choice of tokens.

    L = - sum_i w_i log pi(target_i) / sum_i w_i

policy log pi and weights w float [S]. Raw text trains all its tokens; the answers of conversations are what the mask
says.
"""

from typing import Literal

from torch import Tensor

from graftlm.config import config
from graftlm.losses.base import Batch, LossConfig, LossSum, tokens


@config
class SupervisedConfig(LossConfig):
    name: Literal["supervised"] = "supervised"


@config
class PretrainingConfig(LossConfig):
    name: Literal["pretraining"] = "pretraining"


def value(
    config: SupervisedConfig | PretrainingConfig, policy: Tensor, reference: Tensor | None, batch: Batch
) -> LossSum:
    return LossSum(-(batch.weights * policy).sum(), tokens(config, batch))
