"""Multiple choice by likelihood, with the names and formulas of lm-eval 0.4.13. c is a choice, x the prompt:

    acc               argmax_c ln p(c | x) is right
    acc_norm          argmax_c ln p(c | x) / characters of c is right
    acc_bytes         argmax_c ln p(c | x) / UTF-8 bytes of c is right
    acc_mutual_info   argmax_c ln p(c | x) - ln p(c) is right (Holtzman et al. 2021, arXiv:2104.08315, equation 3,
                      with the token that begins a text as the neutral prompt)
    brier_score       mean of sum_c (q_c - [c is right])^2 (Brier 1950), from 0 to 2, the lower the better
    choice_nll        mean of -ln(sum of q_c over right choices), in nats
    ece               expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3): the mean over bins of
                      |accuracy - confidence|, by share of items; confidence is max_c q_c, in 15 equal bins

q = softmax_c ln p(c | x), over the choices alone. Characters and bytes are those of the choice without the space before
it. Of equal choices the first is taken. A row with several right choices is right where one of them is taken; its
Brier score has [c is right] / their number, which lm-eval refuses. An empty choice is refused where it divides.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np

from graftlm.config.schema import PositiveCount, config
from graftlm.errors import DataError
from graftlm.evaluation.metrics.base import UNBOUNDED, Array, Choice, Likelihood, MetricConfig, MetricRow, scores


@config
class AccConfig(MetricConfig):
    name: Literal["acc"] = "acc"


@config
class AccNormConfig(MetricConfig):
    name: Literal["acc_norm"] = "acc_norm"


@config
class AccBytesConfig(MetricConfig):
    name: Literal["acc_bytes"] = "acc_bytes"


@config
class AccMutualInfoConfig(MetricConfig):
    name: Literal["acc_mutual_info"] = "acc_mutual_info"


@config
class BrierConfig(MetricConfig):
    name: Literal["brier_score"] = "brier_score"


@config
class ChoiceNllConfig(MetricConfig):
    name: Literal["choice_nll"] = "choice_nll"


@config
class EceConfig(MetricConfig):
    name: Literal["ece"] = "ece"
    bins: PositiveCount = 15


def acc(item: Choice | Likelihood) -> float:
    """Of a text alone: whether each of its tokens was the likeliest."""
    return float(item.greedy) if isinstance(item, Likelihood) else float(item.best in item.gold)


def acc_norm(item: Choice) -> float:
    return _right(item, np.asarray(item.log_probs) / _sizes(item, list(map(len, item.texts))))


def acc_bytes(item: Choice) -> float:
    return _right(item, np.asarray(item.log_probs) / _sizes(item, [len(each.encode()) for each in item.texts]))


def acc_mutual_info(item: Choice) -> float:
    assert item.unconditional is not None, "MetricRow.unconditional asks for them"
    return _right(item, np.asarray(item.log_probs) - np.asarray(item.unconditional))


def brier_score(item: Choice) -> float:
    wanted = np.zeros(len(item.texts))
    wanted[list(item.gold)] = 1 / len(item.gold)
    return float(((item.probabilities - wanted) ** 2).sum())


def choice_nll(item: Choice) -> float:
    logs = np.asarray(item.log_probs)
    return float(np.logaddexp.reduce(logs) - np.logaddexp.reduce(logs[list(item.gold)]))


def _right(item: Choice, values: Array) -> float:
    return float(int(np.argmax(values)) in item.gold)


def _sizes(item: Choice, sizes: list[int]) -> Array:
    if 0 in sizes:
        raise DataError(
            f"{item.where}: choice {sizes.index(0)} is empty, so its likelihood cannot be divided by its length: give "
            "it a text, or take `acc`",
            code="empty-choice",
        )
    return np.asarray(sizes)


def ece_parts(config: EceConfig, items: Sequence[Choice]) -> Array:
    """Of each bin: items, right ones, sum of confidences [n, 3 bins]."""
    found = np.zeros((len(items), 3, config.bins))
    for each, item in zip(found, items, strict=True):
        confidence = float(item.probabilities.max())
        # bins ((m - 1)/M, m/M], the first one with 0
        each[:, max(0, int(np.ceil(confidence * config.bins)) - 1)] = 1, item.best in item.gold, confidence
    return found.reshape(len(items), -1)


def ece(sums: Array) -> Array:
    bins = sums.reshape(*sums.shape[:-1], 3, -1)
    found: Array = np.abs(bins[..., 1, :] - bins[..., 2, :]).sum(-1) / bins[..., 0, :].sum(-1)
    return found


def _parts(score: Callable[[Choice], float], config: MetricConfig, items: Sequence[Choice]) -> Array:
    return scores([score(item) for item in items])


CHOICE = (Choice,)
ROWS = {
    "acc": MetricRow(AccConfig, (Choice, Likelihood), partial(_parts, acc)),
    "acc_norm": MetricRow(AccNormConfig, CHOICE, partial(_parts, acc_norm)),
    "acc_bytes": MetricRow(AccBytesConfig, CHOICE, partial(_parts, acc_bytes)),
    "acc_mutual_info": MetricRow(AccMutualInfoConfig, CHOICE, partial(_parts, acc_mutual_info), unconditional=True),
    "brier_score": MetricRow(BrierConfig, CHOICE, partial(_parts, brier_score), high=2.0, higher_is_better=False),
    "choice_nll": MetricRow(
        ChoiceNllConfig, CHOICE, partial(_parts, choice_nll), high=UNBOUNDED, higher_is_better=False
    ),
    "ece": MetricRow(EceConfig, CHOICE, ece_parts, ece, higher_is_better=False),
}
