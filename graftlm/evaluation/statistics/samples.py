"""Samples as arrays, and what is refused of them: one number for each row, and the cluster that the row is in."""

from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.errors import DataError

Values = Sequence[float] | NDArray[Any]
Clusters = Sequence[Hashable] | None


def normal_quantile(level: float) -> float:
    """The normal quantile that leaves half of 1 - level above it."""
    return NormalDist().inv_cdf((1 + inside(level, "level")) / 2)


def inside(value: float, name: str) -> float:
    if not 0 < value < 1:
        raise DataError(
            f"{name} is {value}, and must lie between 0 and 1: a level is 0.95, an alpha 0.05, a power 0.8",
            code="not-a-probability",
        )
    return value


def finite(values: Values) -> NDArray[Any]:
    found = np.asarray(values, dtype=float)
    if found.ndim != 1 or not len(found):
        raise DataError(
            f"a sample of shape {found.shape}: statistics need one number for each row, and one row at least",
            code="empty-sample",
        )
    if len(wrong := np.flatnonzero(~np.isfinite(found))):
        raise DataError(f"value {wrong[0]} is {found[wrong[0]]}: leave rows without a value out", code="not-finite")
    return found


def binary(outcomes: Values) -> NDArray[Any]:
    found = finite(outcomes)
    if len(wrong := np.flatnonzero((found != 0) & (found != 1))):
        raise DataError(
            f"outcome {wrong[0]} is {found[wrong[0]]:g}: a rate is of outcomes 0 and 1; for other scores take "
            "`mean_interval`, `difference_interval` or `detectable_mean_difference`",
            code="not-an-outcome",
        )
    return found


def pairs(first: NDArray[Any], second: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if len(first) != len(second):
        raise DataError(
            f"{len(first)} values and {len(second)}: pairs are of the same rows, in the same order",
            code="unequal-lengths",
        )
    return first, second


def difference(first: Values, second: Values) -> NDArray[Any]:
    one, other = pairs(finite(first), finite(second))
    found: NDArray[Any] = one - other
    return found


def by_cluster(values: NDArray[Any], clusters: Clusters) -> tuple[NDArray[Any], NDArray[Any]]:
    """(sum, number of values) of each cluster, in the order in which they first occur."""
    names = range(len(values)) if clusters is None else clusters
    if len(names) != len(values):
        raise DataError(
            f"{len(values)} values and {len(names)} clusters: each value has the cluster of its row",
            code="unequal-lengths",
        )
    number: dict[Hashable, int] = {}
    places = np.array([number.setdefault(name, len(number)) for name in names])
    if len(number) < 2:
        raise DataError(
            f"{len(values)} values in one cluster: how much clusters differ cannot be seen from one. Take rows of "
            "several groups",
            code="one-cluster",
        )
    return np.bincount(places, values), np.bincount(places).astype(float)
