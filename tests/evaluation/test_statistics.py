"""Intervals, tests and power against enumeration, numerical inversion and simulation: there is no scipy here."""

from collections.abc import Callable, Sequence
from itertools import product
from math import comb, sqrt
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
import pytest

from graftlm.evaluation.statistics.detectable import detectable_mean_difference, detectable_rate_difference
from graftlm.evaluation.statistics.intervals import Interval, difference_interval, mean_interval, wilson_interval
from graftlm.evaluation.statistics.significance import holm, mcnemar
from tests.errors import raises

Z95 = 1.959963984540054


def outcomes(ones: int, n: int) -> list[int]:
    return [1] * ones + [0] * (n - ones)


def pairs(first_only: int, second_only: int, both: int = 0, neither: int = 0) -> tuple[list[int], list[int]]:
    kinds = [(1, 0)] * first_only + [(0, 1)] * second_only + [(1, 1)] * both + [(0, 0)] * neither
    return [a for a, _ in kinds], [b for _, b in kinds]


def root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where a function changes its sign, by bisection."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (f(middle) > 0) == (f(low) > 0) else (low, middle)
    return low


# Wilson --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 10, 48, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_wilson_s_interval_holds_the_rates_that_the_score_test_does_not_reject(n: int, share: float) -> None:
    k = round(share * n)
    found = wilson_interval(outcomes(k, n))

    def beyond(rate: float) -> float:
        """Positive where the score test rejects this rate."""
        return abs(k / n - rate) - Z95 * sqrt(rate * (1 - rate) / n)

    assert found.value == k / n
    assert found.n == n
    assert found.low == pytest.approx(root(beyond, 0.0, k / n) if k else 0.0, abs=1e-9)
    assert found.high == pytest.approx(root(beyond, k / n, 1.0) if k < n else 1.0, abs=1e-9)


def test_wilson_s_interval_is_symmetric_and_narrows_with_rows_and_level() -> None:
    some, others = wilson_interval(outcomes(3, 20)), wilson_interval(outcomes(17, 20))
    assert (others.low, others.high) == pytest.approx((1 - some.high, 1 - some.low))
    more, surer = wilson_interval(outcomes(30, 200)), wilson_interval(outcomes(3, 20), level=0.99)
    assert surer.low < some.low < more.low < more.high < some.high < surer.high
    assert wilson_interval(np.array([True, False])) == wilson_interval([1, 0])


def test_wilson_s_interval_covers() -> None:
    """Exactly: the probability, over all counts, that the interval holds the rate. It may be a little below 0.95."""
    n = 40
    held = [wilson_interval(outcomes(k, n)) for k in range(n + 1)]
    for rate in (0.1, 0.3, 0.5, 0.8):
        chances = [comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1)]
        assert 0.92 < sum(c for c, i in zip(chances, held, strict=True) if i.low <= rate <= i.high) < 0.98


# Bootstrap -----------------------------------------------------------------------------------------------------------


def every_resample(values: Sequence[float], clusters: Sequence[Any]) -> list[float]:
    """The means of all equally likely resamples of clusters, by enumeration."""
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in dict.fromkeys(clusters)]
    return [fmean(sum(drawn, [])) for drawn in product(groups, repeat=len(groups))]


def test_the_ends_are_the_quantiles_of_all_resamples_of_clusters() -> None:
    values, clusters = [0.0, 1.5, 2.0, 7.0, 1.0, 3.0, 4.0, 4.5, 9.0], list("aabbbbcde")
    everything = np.sort(every_resample(values, clusters))
    assert len(everything) == 5**5
    found = mean_interval(values, clusters, draws=200_000, level=0.9)
    assert found.value == pytest.approx(fmean(values))
    assert found.n == len(values)
    near = 0.004  # of the ranks: several standard errors of a share among so many draws
    for end, rank in ((found.low, 0.05), (found.high, 0.95)):
        below, above = np.quantile(everything, [rank - near, rank + near])
        assert below <= end <= above


def test_clusters_of_one_row_are_rows() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert mean_interval(values, [f"group {i}" for i in range(30)]) == mean_interval(values)


def test_rows_that_are_repeated_within_their_clusters_say_nothing_new() -> None:
    draw = np.random.default_rng(1)
    values, clusters = draw.normal(size=40), [i % 8 for i in range(40)]
    once = mean_interval(values, clusters)
    twice = mean_interval([*values, *values], clusters * 2)
    assert twice == pytest.approx(once._replace(n=80))
    rows, more_rows = mean_interval(values), mean_interval([*values, *values])
    assert more_rows.high - more_rows.low < 0.8 * (rows.high - rows.low), "as rows of their own they would"
    wide = detectable_mean_difference([*values, *values], np.zeros(80), clusters * 2)
    assert wide == pytest.approx(detectable_mean_difference(values, np.zeros(40), clusters))


def test_the_models_exchanged_turn_the_interval_round() -> None:
    draw = np.random.default_rng(2)
    a, b, clusters = draw.normal(size=60), draw.normal(size=60), [i // 5 for i in range(60)]
    one, other = difference_interval(a, b, clusters), difference_interval(b, a, clusters)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert difference_interval(a, b, clusters) == one, "the same seed, the same draws"
    assert difference_interval(a, b, clusters, seed=1) != one
    assert difference_interval(a, a, clusters) == Interval(0.0, 0.0, 0.0, 60)
    assert difference_interval(a + 3, b + 3, clusters) == pytest.approx(one), "what both have in common cancels"


def test_the_order_of_rows_and_the_names_of_clusters_do_not_matter() -> None:
    values, clusters = [1.0, 5.0, 2.0, 8.0, 3.0, 1.0], ["x", "y", "x", "z", "y", "z"]
    order = [0, 2, 1, 4, 3, 5]
    assert mean_interval([values[i] for i in order], [clusters[i] for i in order]) == mean_interval(values, clusters)
    assert mean_interval(values, [ord(c) for c in clusters]) == mean_interval(values, clusters)


def test_draws_are_made_in_blocks_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=50)
    whole = mean_interval(values, draws=2000)
    monkeypatch.setattr("graftlm.evaluation.statistics.intervals.BLOCK", 50 * 300)
    assert mean_interval(values, draws=2000) == pytest.approx(whole)


@pytest.mark.parametrize(("count", "share"), [(6, 0.87), (12, 0.90), (30, 0.93)])
def test_how_often_the_interval_holds_the_truth(count: int, share: float) -> None:
    """The shares that the docstring of `mean_interval` names; rows of a cluster have half their variance in common."""
    draw, rows, samples = np.random.default_rng(4), 6, 500
    clusters = [i // rows for i in range(count * rows)]
    held, held_by_rows = 0, 0
    for number in range(samples):
        values = (draw.normal(size=(count, 1)) + draw.normal(size=(count, rows))).ravel()
        found = mean_interval(values, clusters, draws=400, seed=number)
        rows_alone = mean_interval(values, draws=400, seed=number)
        held += found.low <= 0 <= found.high
        held_by_rows += rows_alone.low <= 0 <= rows_alone.high
    assert held / samples == pytest.approx(share, abs=0.035)  # 2.5 standard errors at 0.9, and rounding
    assert held_by_rows / samples < share - 0.1


# McNemar and Holm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_only", range(6))
@pytest.mark.parametrize("second_only", range(6))
def test_mcnemar_s_p_is_the_share_of_signs_that_are_as_uneven(first_only: int, second_only: int) -> None:
    differ = first_only + second_only
    uneven = abs(first_only - second_only)
    every = [abs(sum(signs)) >= uneven for signs in product((-1, 1), repeat=differ)]
    found = mcnemar(*pairs(first_only, second_only, both=3, neither=2))
    assert found.p == pytest.approx(fmean(every), abs=1e-15)
    assert found[1:] == (first_only, second_only, differ + 5)


def test_mcnemar_does_not_depend_on_the_order_of_models_and_on_rows_that_agree() -> None:
    a, b = pairs(14, 3, both=20, neither=11)
    assert mcnemar(b, a) == mcnemar(a, b)._replace(first_only=3, second_only=14)
    assert mcnemar(a, b).p == mcnemar(*pairs(14, 3)).p
    assert mcnemar(a, a).p == 1.0
    assert mcnemar(*pairs(3000, 0)).p < 1e-300


def rejected(p_values: Sequence[float], alpha: float) -> set[int]:
    """Holm's procedure as it is defined: step down, and stop at the first that is not rejected."""
    found: set[int] = set()
    for p, index in sorted((p, i) for i, p in enumerate(p_values)):
        if p > alpha / (len(p_values) - len(found)):
            break
        found.add(index)
    return found


def test_holm_s_p_values_are_the_smallest_levels_at_which_his_procedure_rejects() -> None:
    grid = np.linspace(0, 1, 2001)
    draw = np.random.default_rng(5)
    for _ in range(20):
        p_values = draw.choice([0.001, 0.01, 0.02, 0.04, 0.3, 1.0], size=4).tolist()
        for index, adjusted in enumerate(holm(p_values)):
            first = next((alpha for alpha in grid if index in rejected(p_values, alpha + 1e-9)), 1.0)
            assert first - 0.0006 <= adjusted <= first + 1e-9


def test_holm_by_hand_and_for_one_and_none() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# What could have been found ------------------------------------------------------------------------------------------


def power_of_mcnemar(n: int, one: float, other: float, alpha: float) -> float:
    """By enumeration of all counts (for the first alone, for the second alone), with their multinomial probability."""
    return sum(
        comb(n, b) * comb(n - b, c) * one**b * other**c * (1 - one - other) ** (n - b - c)
        for b in range(n + 1)
        for c in range(n - b + 1)
        if mcnemar(*pairs(b, c, neither=n - b - c)).p <= alpha
    )


@pytest.mark.parametrize(("first_only", "second_only", "neither"), [(3, 3, 14), (0, 0, 20), (9, 1, 10), (1, 0, 24)])
def test_the_difference_of_rates_is_found_with_just_that_power(first_only: int, second_only: int, neither: int) -> None:
    a, b = pairs(first_only, second_only, neither=neither)
    n = len(a)
    found = detectable_rate_difference(a, b)
    share = (first_only + second_only) / n
    for difference, enough in ((found, True), (found - 1e-4, False)):
        differ = max(share, difference)
        power = power_of_mcnemar(n, (differ + difference) / 2, max(0.0, differ - difference) / 2, 0.05)
        assert (power >= 0.8) == enough
    assert detectable_rate_difference(b, a) == found


def test_alpha_at_a_possible_p_value_counts_as_rejected() -> None:
    """Of 5 rows that all differ in one direction, p is 1/16, a number without rounding."""
    assert detectable_rate_difference(*pairs(5, 0), alpha=1 / 16) < 1.0
    assert detectable_rate_difference(*pairs(5, 0), alpha=1 / 16 - 1e-6) == float("inf")


def test_more_rows_find_smaller_differences_and_too_few_find_none() -> None:
    found = [detectable_rate_difference(*pairs(k, k, both=8 * k)) for k in (2, 5, 20, 100)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx((Z95 + 0.8416) * sqrt(0.2 / 1000), rel=0.06), "nearly normal by then"
    a, b = pairs(10, 10, both=80)
    assert detectable_rate_difference(a, b, power=0.9) > detectable_rate_difference(a, b)
    assert detectable_rate_difference(a, b, alpha=0.01) > detectable_rate_difference(a, b)


def test_the_difference_of_means_is_that_of_the_z_test() -> None:
    draw = np.random.default_rng(6)
    a, b = draw.normal(size=50), draw.normal(size=50)
    by_hand = (Z95 + NormalDist().inv_cdf(0.8)) * stdev(a - b) / sqrt(50)
    assert detectable_mean_difference(a, b) == pytest.approx(by_hand)
    assert detectable_mean_difference(b, a) == pytest.approx(by_hand)


def test_the_difference_of_means_is_found_in_four_of_five_samples() -> None:
    """Simulated, with clusters: samples around the difference that a first one calls detectable."""
    draw, count, rows = np.random.default_rng(7), 80, 3

    def sample(centre: float, times: int) -> Any:
        return centre + draw.normal(size=(times, count, 1)) + draw.normal(size=(times, count, rows))

    clusters = [i // rows for i in range(count * rows)]
    detectable = fmean(
        detectable_mean_difference(one.ravel(), np.zeros(count * rows), clusters) for one in sample(0.0, 50)
    )
    means = sample(detectable, 4000).mean(2)  # of clusters of one size
    z = means.mean(1) / (means.std(1, ddof=1) / sqrt(count))
    assert (abs(z) > Z95).mean() == pytest.approx(0.8, abs=0.025)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [wilson_interval, mean_interval])
def test_no_values_are_refused(function: Callable[[Any], Any]) -> None:
    for nothing in ([], np.zeros((2, 2))):
        with raises("data/empty-sample", match="one number for each row"):
            function(nothing)


def test_pairs_of_other_lengths_are_refused() -> None:
    for function in (mcnemar, difference_interval, detectable_rate_difference, detectable_mean_difference):
        with raises("data/unequal-lengths", match="2 values and 3"):
            function([0, 1], [0, 1, 1])
        with raises("data/empty-sample"):
            function([], [])
    with raises("data/unequal-lengths", match="2 values and 1 clusters"):
        mean_interval([0, 1], ["a"])


def test_what_is_no_outcome_is_refused_with_its_place() -> None:
    for function in (wilson_interval, lambda values: mcnemar([0, 1, 1], values)):
        with raises("data/not-an-outcome", match="outcome 1 is 0.5"):
            function([1, 0.5, 0])
    with raises("data/not-finite", match="value 2 is nan"):
        mean_interval([1.0, 2.0, float("nan")])


def test_one_cluster_has_no_interval() -> None:
    with raises("data/one-cluster"):
        mean_interval([1.0, 2.0], ["a", "a"])
    with raises("data/one-cluster"):
        detectable_mean_difference([1.0], [0.0])


@pytest.mark.parametrize("level", [0.0, 1.0, 95, -1])
def test_levels_are_probabilities(level: float) -> None:
    a, b = pairs(3, 2)
    calls: list[Callable[[], object]] = [
        lambda: wilson_interval(a, level=level),
        lambda: mean_interval(a, level=level),
        lambda: detectable_rate_difference(a, b, alpha=level),
        lambda: detectable_mean_difference(a, b, power=level),
    ]
    for call in calls:
        with raises("data/not-a-probability"):
            call()
    with raises("data/not-a-probability", match="p value 1 is 1.5"):
        holm([0.1, 1.5])
