"""Whether two models differ on the same rows, and how to ask that of several pairs at once."""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

from graftlm.errors import DataError
from graftlm.evaluation.statistics.samples import Values, binary, pairs


class McNemar(NamedTuple):
    p: float
    """Two-sided."""
    first_only: int
    """Rows that the first answered and the second did not."""
    second_only: int
    n: int
    """Rows."""


def mcnemar(first: Values, second: Values) -> McNemar:
    """The exact test of McNemar (1947) of whether two models answer equally many of the same rows, from 0/1 outcomes:

        p = min(1, 2 P(X <= min(b, c))),    X ~ Binomial(b + c, 1/2)

    b rows are 1 for the first alone, c for the second alone. Raises DataError for other outcomes or lengths.
    """
    one, other = pairs(binary(first), binary(second))
    b, c = int((one > other).sum()), int((other > one).sum())
    return McNemar(sign_test(min(b, c), b + c), b, c, len(one))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of several tests, adjusted by Holm (1979), in their order: those at most alpha are rejected, and
    with a probability of at most alpha any of them is wrongly so.

        p~_(i) = max over j <= i of min(1, (m - j + 1) p_(j)),    p_(1) <= ... <= p_(m)
    """
    adjusted, so_far, m = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, index in enumerate(sorted(range(m), key=p_values.__getitem__)):
        if not 0 <= p_values[index] <= 1:
            raise DataError(
                f"p value {index} is {p_values[index]}, and must lie between 0 and 1", code="not-a-probability"
            )
        so_far = max(so_far, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = so_far
    return adjusted


def sign_test(fewer: int, count: int) -> float:
    """min(1, 2 P(X <= fewer)) for X ~ Binomial(count, 1/2), in whole numbers."""
    return min(1.0, 2 * sum(comb(count, k) for k in range(fewer + 1)) / (1 << count))
