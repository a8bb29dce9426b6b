"""Correlations of answers and references over a corpus, from -1 to 1.

    mcc        Matthews (1975), for several labels by Gorodkin (2004): (c s - sum_k p_k t_k) /
               sqrt((s^2 - sum_k p_k^2)(s^2 - sum_k t_k^2)); s items, c right, p_k answered k, t_k are k. 0 where one
               label is all there is
    pearson    sum (x - mean x)(y - mean y) / sqrt(sum (x - mean x)^2 sum (y - mean y)^2)
    spearman   Pearson of the ranks (1904); equal values have the mean of their ranks

A label is the whole answer, its case apart. Answers that no reference of the corpus has are one more label, and wrong.
In multiple choice labels are numbers of choices. For pearson and spearman an answer must be a number alone; what is
none counts as `otherwise`. Where all values are equal they are not defined (NaN). An interval of spearman is by the
ranks of the whole sample.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, Strict

from graftlm.config.schema import config
from graftlm.errors import DataError
from graftlm.evaluation.metrics.base import Answer, Array, Choice, MetricConfig, MetricRow, references

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]


@config
class MccConfig(MetricConfig):
    name: Literal["mcc"] = "mcc"


@config
class PearsonConfig(MetricConfig):
    name: Literal["pearson"] = "pearson"
    otherwise: Number = 0.0
    """What an answer that is no number counts as."""


@config
class SpearmanConfig(MetricConfig):
    name: Literal["spearman"] = "spearman"
    otherwise: Number = 0.0
    """What an answer that is no number counts as."""


def mcc_parts(config: MccConfig, items: Sequence[Answer | Choice]) -> Array:
    """The confusion matrix of each item, flat [n, K K]: answers by references. K depends on what is right alone."""
    pairs = [_labels(item) for item in items]
    known = {label: k for k, label in enumerate(sorted({label for item in items for label in _right(item)}))}
    found = np.zeros((len(items), len(known) + 1, len(known) + 1))
    for each, (said, wanted) in zip(found, pairs, strict=True):
        each[known.get(said, len(known)), known[wanted]] = 1
    return found.reshape(len(items), -1)


def _right(item: Answer | Choice) -> list[str]:
    """Labels that the item has, or could have."""
    if isinstance(item, Choice):
        return [str(number) for number in range(len(item.texts))]
    return [each.strip().casefold() for each in references(item, "mcc")]


def _labels(item: Answer | Choice) -> tuple[str, str]:
    """(the answer, what would be right)."""
    if isinstance(item, Choice):
        return str(item.best), str(item.best if item.best in item.gold else item.gold[0])
    said, wanted = item.text.strip().casefold(), _right(item)
    return said, said if said in wanted else wanted[0]


def mcc(sums: Array) -> Array:
    labels = math.isqrt(sums.shape[-1])
    confusion = sums.reshape(*sums.shape[:-1], labels, labels)
    s, c = confusion.sum((-1, -2)), np.trace(confusion, axis1=-2, axis2=-1)
    p, t = confusion.sum(-1), confusion.sum(-2)
    above = c * s - (p * t).sum(-1)
    below = np.sqrt((s**2 - (p**2).sum(-1)) * (s**2 - (t**2).sum(-1)))
    found: Array = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return found


def number_parts(ranked: bool, config: PearsonConfig | SpearmanConfig, items: Sequence[Answer]) -> Array:
    """1, x, y, x^2, y^2, xy of each item [n, 6], about the means of the sample."""
    x = np.asarray([number(item.text, config.otherwise) for item in items])
    y = np.asarray([_wanted(item, config.name) for item in items])
    x, y = (ranks(each) if ranked else each for each in (x, y))
    x, y = x - x.mean(), y - y.mean()
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def correlation(sums: Array) -> Array:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    n = np.maximum(n, 1)
    spread_x, spread_y = xx - x * x / n, yy - y * y / n
    tiny = 1e-12
    below = np.sqrt(np.maximum(spread_x, 0) * np.maximum(spread_y, 0))
    defined = (spread_x > tiny * np.maximum(xx, tiny)) & (spread_y > tiny * np.maximum(yy, tiny))
    found: Array = np.divide(xy - x * y / n, below, out=np.full(below.shape, np.nan), where=defined)
    return found


def ranks(values: Array) -> Array:
    """From 1; equal values have the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: Array = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return found


def number(text: str, otherwise: float) -> float:
    try:
        found = float(text.strip())
    except ValueError:
        return otherwise
    return found if math.isfinite(found) else otherwise


def _wanted(item: Answer, metric: str) -> float:
    text = references(item, metric)[0]
    found = number(text, math.nan)
    if math.isnan(found):
        raise DataError(
            f"{item.where}: metric {metric!r} compares numbers, and the row's answer is {text!r:.60}",
            code="not-a-number",
        )
    return found


ROWS = {
    "mcc": MetricRow(MccConfig, (Answer, Choice), mcc_parts, mcc, low=-1.0),
    "pearson": MetricRow(PearsonConfig, (Answer,), partial(number_parts, False), correlation, low=-1.0),
    "spearman": MetricRow(SpearmanConfig, (Answer,), partial(number_parts, True), correlation, low=-1.0),
}
