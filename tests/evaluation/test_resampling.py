"""Bootstrap and randomization test of statistics of sums: those of means where they are means, and right elsewhere."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from graftlm.evaluation.statistics.intervals import mean_interval
from graftlm.evaluation.statistics.resampling import randomization_test, statistic_difference, statistic_interval
from tests.errors import raises


def mean(sums: Any) -> Any:
    return sums[..., 0] / sums[..., 1]


def parts(values: Any) -> Any:
    return np.stack([values, np.ones(len(values))], axis=1)


def ratio(sums: Any) -> Any:
    return np.exp(sums[..., 0] / sums[..., 1])


def test_the_interval_of_a_mean_is_that_of_mean_interval() -> None:
    values = np.random.default_rng(0).exponential(size=60)
    clusters = [n // 3 for n in range(60)]
    for groups in (None, clusters):
        one = statistic_interval(parts(values), mean, groups, draws=20_000)
        other = mean_interval(values, groups, draws=20_000)
        assert one.value == pytest.approx(other.value)
        assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=0.02)


def test_the_test_of_a_mean_is_the_sign_flip_test() -> None:
    """Exact for a few rows: all 2^n signs, counted by hand."""
    draw = np.random.default_rng(1)
    a, b = draw.normal(size=8), draw.normal(size=8) + 0.8
    differences = a - b
    observed = abs(differences.sum()) - 1e-12
    signs = [abs(sum(s * d for s, d in zip(each, differences, strict=True))) for each in product((1, -1), repeat=8)]
    p = sum(each >= observed for each in signs) / 2**8
    assert randomization_test(parts(a), parts(b), mean) == pytest.approx(p)
    assert randomization_test(parts(b), parts(a), mean) == pytest.approx(p)
    assert randomization_test(parts(a), parts(a), mean) == 1
    many = randomization_test(parts(a), parts(b), mean, draws=200)
    assert many == pytest.approx(p, abs=0.1), "by drawn signs, where there are more than draws"


def test_rows_of_a_cluster_are_exchanged_together() -> None:
    ones, zeros = np.ones(12), np.zeros(12)
    assert randomization_test(parts(ones), parts(zeros), mean, draws=2**12) == 2 / 2**12
    assert randomization_test(parts(ones), parts(zeros), mean, [n // 6 for n in range(12)]) == 0.5


@pytest.mark.parametrize("statistic", [mean, ratio])
def test_of_models_that_are_alike_one_in_twenty_is_called_different(statistic: Any) -> None:
    draw, found = np.random.default_rng(2), []
    for seed in range(200):
        shared = draw.normal(size=40)
        a, b = (parts(shared + draw.normal(size=40)) for _ in range(2))
        found.append(randomization_test(a, b, statistic, draws=200, seed=seed))
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.04)


def test_the_interval_of_a_ratio_holds_the_truth() -> None:
    """exp of a rate with rows of different sizes, as a perplexity is."""
    draw, inside, errors = np.random.default_rng(3), [], []
    for seed in range(150):
        sizes = draw.integers(1, 9, size=80).astype(float)
        rows = np.stack([sizes * 0.5 + draw.normal(size=80), sizes], axis=1)
        found = statistic_interval(rows, ratio, draws=400, seed=seed)
        inside.append(found.low <= np.exp(0.5) <= found.high)
        errors.append(statistic_difference(rows, np.zeros_like(rows) + (0, 1), ratio, draws=400, seed=seed).error)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.05)
    by_delta_method = np.exp(0.5) * np.sqrt(80) / (80 * 4.5)
    assert np.mean(errors) == pytest.approx(by_delta_method, rel=0.05)


def test_where_a_statistic_is_not_defined_nothing_is_found() -> None:
    zeros = np.zeros((5, 2))
    with np.errstate(all="ignore"):
        found = statistic_interval(zeros, mean)
        assert np.isnan(found.low)
        assert randomization_test(zeros, zeros, mean) == 1


def test_samples_that_do_not_fit_are_refused() -> None:
    with raises("data/one-cluster"):
        statistic_interval(parts(np.ones(3)), mean, ["a"] * 3)
    with raises("data/unequal-lengths", match="3 rows and 2 clusters"):
        statistic_interval(parts(np.ones(3)), mean, ["a", "b"])
    with raises("data/unequal-lengths"):
        statistic_difference(parts(np.ones(3)), parts(np.ones(2)), mean)
    with raises("data/not-a-probability"):
        statistic_interval(parts(np.ones(3)), mean, level=95)
