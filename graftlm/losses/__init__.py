"""LOSSES: pure functions on log-probabilities -> (sum, count, metrics).

A loss is given log p of each target, in nats, and says what to minimise as a sum and what to divide it by. The count is
returned, not divided by: over accumulated packs and several devices only sums add up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossSum:
    """sum: a scalar with a gradient; count: what the sum is divided by, over the whole accumulated batch."""

    sum: Tensor
    count: Tensor
    metrics: Mapping[str, Tensor]


def supervised(policy: Tensor, reference: Tensor | None, weights: Tensor) -> LossSum:
    """Negative log-likelihood of the targets: policy and weights float32 [S]; no reference is needed."""
    return LossSum(-(weights * policy).sum(), weights.sum(), {})


LOSSES: dict[str, Callable[[Tensor, Tensor | None, Tensor], LossSum]] = {"supervised": supervised}
