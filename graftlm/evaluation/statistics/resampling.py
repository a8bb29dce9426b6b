"""Intervals and tests for any statistic of sums over rows: a mean, BLEU, a correlation.

    statistic(sums [..., k]) -> [...];    parts [n, k] of n rows, so that the value is statistic(parts.sum(0))

Rows of one cluster are drawn, or exchanged, together. A draw for which the statistic is not defined (NaN) is left out.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from graftlm.errors import DataError
from graftlm.evaluation.statistics.intervals import BLOCK, Interval
from graftlm.evaluation.statistics.samples import Clusters, inside

Array = NDArray[Any]
Statistic = Callable[[Array], Array]

DRAWS = 2_000
"""Resamples for a statistic that is no mean, which costs more to compute."""
ROUNDING = 1e-9
"""A difference that is as large up to rounding counts as as large."""


class Difference(NamedTuple):
    interval: Interval
    """Of statistic(first) - statistic(second)."""
    error: float
    """The standard deviation of the draws: how far the difference is off from sample to sample."""


def statistic_interval(
    parts: Array,
    statistic: Statistic,
    clusters: Clusters = None,
    *,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """The statistic, with the percentile interval of a bootstrap of whole clusters, as `mean_interval`.

    Raises DataError for fewer than two clusters.
    """
    sums = _cluster_sums(parts, clusters)
    found = np.concatenate([statistic(drawn @ sums) for drawn in _drawn(len(sums), draws, seed)])
    low, high = _ends(found, level)
    return Interval(float(statistic(sums.sum(0))), low, high, len(parts))


def statistic_difference(
    first: Array,
    second: Array,
    statistic: Statistic,
    clusters: Clusters = None,
    *,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """The same of statistic(first) - statistic(second), which two models have on the same rows in the same order."""
    one, other = _pair(first, second, clusters)
    found = np.concatenate(
        [statistic(drawn @ one) - statistic(drawn @ other) for drawn in _drawn(len(one), draws, seed)]
    )
    low, high = _ends(found, level)
    value = float(statistic(one.sum(0)) - statistic(other.sum(0)))
    return Difference(Interval(value, low, high, len(first)), float(np.nanstd(found)))


def randomization_test(
    first: Array, second: Array, statistic: Statistic, clusters: Clusters = None, *, draws: int = DRAWS, seed: int = 0
) -> float:
    """p, two-sided, of the paired randomization test (Noreen 1989; for language Riezler and Maxwell 2005): were the
    models alike, either could have given either answer to a row.

        p = (1 + number of draws with |statistic(first') - statistic(second')| >= that of the sample) / (draws + 1)

    A draw exchanges the rows of each cluster with probability 1/2. For a mean that is the sign-flip test of the
    differences. Up to as many clusters as have no more than `draws` exchanges, all of these are counted: then p is
    exact, and at least 2^(1 - clusters). Where the statistic is not defined for the sample, p is 1.
    """
    one, other = _pair(first, second, clusters)
    count, total = len(one), one.sum(0) + other.sum(0)
    observed = abs(float(statistic(one.sum(0)) - statistic(other.sum(0))))
    if np.isnan(observed):
        return 1.0
    exact = 2**count <= draws
    if exact:
        flips = (np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(float)
    else:
        flips = np.random.default_rng(seed).integers(2, size=(draws, count)).astype(float)
    as_large = 0
    for begin in range(0, len(flips), block := max(1, BLOCK // count)):
        mine = one.sum(0) + flips[begin : begin + block] @ (other - one)
        found = np.abs(statistic(mine) - statistic(total - mine))
        as_large += int((np.isnan(found) | (found >= observed * (1 - ROUNDING) - ROUNDING**2)).sum())
    return as_large / len(flips) if exact else (1 + as_large) / (draws + 1)


def _cluster_sums(parts: Array, clusters: Clusters) -> Array:
    """Sums of each cluster [G, k], clusters in the order in which they first occur."""
    names = range(len(parts)) if clusters is None else clusters
    if len(names) != len(parts):
        raise DataError(
            f"{len(parts)} rows and {len(names)} clusters: each row has the cluster that it is in",
            code="unequal-lengths",
        )
    number: dict[Any, int] = {}
    places = np.array([number.setdefault(name, len(number)) for name in names], dtype=int)
    if len(number) < 2:
        raise DataError(
            f"{len(parts)} rows in one cluster: how much clusters differ cannot be seen from one. Take rows of several "
            "groups",
            code="one-cluster",
        )
    sums = np.zeros((len(number), parts.shape[1]))
    np.add.at(sums, places, parts)
    return sums


def _pair(first: Array, second: Array, clusters: Clusters) -> tuple[Array, Array]:
    if first.shape != second.shape:
        raise DataError(
            f"parts of shape {first.shape} and {second.shape}: pairs are of the same rows, in the same order",
            code="unequal-lengths",
        )
    return _cluster_sums(first, clusters), _cluster_sums(second, clusters)


def _drawn(count: int, draws: int, seed: int) -> Iterator[Array]:
    """How often each of `count` clusters is drawn [some draws, count], in blocks of bounded memory."""
    random, block = np.random.default_rng(seed), max(1, BLOCK // count)
    chances = np.full(count, 1 / count)
    for begin in range(0, draws, block):
        yield random.multinomial(count, chances, size=min(block, draws - begin)).astype(float)


def _ends(found: Array, level: float) -> tuple[float, float]:
    tail = (1 - inside(level, "level")) / 2
    defined = found[~np.isnan(found)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, (tail, 1 - tail))
    return float(low), float(high)
