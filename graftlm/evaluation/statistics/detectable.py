"""The smallest difference that a sample could have found: what "no difference was found" says, and does not say."""

from functools import cache, partial
from math import log, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.evaluation.statistics.samples import (
    Clusters,
    Values,
    binary,
    by_cluster,
    difference,
    inside,
    normal_quantile,
    pairs,
)

NEGLIGIBLE = 1e-12
PRECISION = 1e-6
"""Of a difference of rates."""


def detectable_mean_difference(
    first: Values,
    second: Values,
    clusters: Clusters = None,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """The smallest true mean difference that a sample like this one shows as different from 0, two-sided, with this
    probability, by the normal approximation:

        (z_{1 - alpha/2} + z_power) s,    s^2 = G/(G - 1) sum_g (sum_{i in g} (d_i - mean d))^2 / n^2

    d are the n differences, in G clusters. A sample that shows none may still hide a smaller one.
    """
    sums, sizes = by_cluster(difference(first, second), clusters)
    count, n = len(sums), float(sizes.sum())
    deviations = sums - sizes * (sums.sum() / n)
    error = sqrt(count / (count - 1) * float(deviations @ deviations)) / n
    found: float = (normal_quantile(1 - inside(alpha, "alpha")) + NormalDist().inv_cdf(inside(power, "power"))) * error
    return found


def detectable_rate_difference(first: Values, second: Values, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference of two rates, on as many paired rows, that McNemar's exact test finds at `alpha`
    with this probability; infinite where there are too few rows for any.

    The models differ on as large a share of rows as here (or on as many as the difference needs, if that is more). The
    power is exact: rows that differ are Binomial(n, share), and those for the first Binomial(these, 1/2 + d/2 share).
    """
    one, other = pairs(binary(first), binary(second))
    n, observed = len(one), float((one != other).mean())
    logs = np.cumsum(np.log(np.maximum(np.arange(n + 1), 1)))
    alpha, power = inside(alpha, "alpha"), inside(power, "power")
    extreme = cache(partial(_extreme, logs=logs, alpha=alpha))

    def found(difference: float) -> bool:
        share = max(observed, difference)
        towards = (1 + difference / share) / 2
        chances = _binomial(np.arange(n + 1), n, share, logs)
        likely = np.flatnonzero(chances > NEGLIGIBLE).tolist()
        return power <= sum(float(chances[d]) * _both_tails(d, extreme(d), towards, logs) for d in likely)

    low, high = 0.0, 1.0
    if not found(high):
        return float("inf")
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def _extreme(differ: int, logs: NDArray[Any], alpha: float) -> int:
    """The largest count on one side that the test rejects among so many rows that differ; -1 where it rejects none."""
    tails = np.cumsum(_binomial(np.arange(differ // 2 + 1), differ, 0.5, logs))
    return int(np.searchsorted(2 * tails, alpha * (1 + NEGLIGIBLE), side="right")) - 1


def _both_tails(differ: int, extreme: int, towards: float, logs: NDArray[Any]) -> float:
    """P(X <= extreme or X >= differ - extreme) for X ~ Binomial(differ, towards)."""
    counts = np.arange(extreme + 1)
    return float(sum(_binomial(tail, differ, towards, logs).sum() for tail in (counts, differ - counts)))


def _binomial(counts: NDArray[Any], n: int, p: float, logs: NDArray[Any]) -> NDArray[Any]:
    """Probabilities of the counts; `logs` holds the logarithms of factorials."""
    if p in (0.0, 1.0):
        return np.array(counts == n * p, dtype=float)
    found: NDArray[Any] = np.exp(
        logs[n] - logs[counts] - logs[n - counts] + counts * log(p) + (n - counts) * log(1 - p)
    )
    return found
