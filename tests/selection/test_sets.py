"""Methods that choose sets: each order against a naive computation, and against chance on its own criterion."""

from collections.abc import Callable

import numpy as np
import pytest

from graftlm.selection import cluster, diversity, k_center
from graftlm.selection.base import Pool
from tests.selection.conftest import some_rows


def points(count: int = 60, d: int = 5, seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=(count, d)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def radius(x: np.ndarray, centres: list[int]) -> float:
    """The largest distance from any point to the nearest centre: what k-center is to make small."""
    return float(max(min(np.linalg.norm(p - x[c]) for c in centres) for p in x))


def test_the_order_of_k_center_is_the_naive_one() -> None:
    x = points(25)
    order = [min(range(25), key=lambda i: float(((x[i] - x.mean(0)) ** 2).sum()))]
    while len(order) < 25:
        rest = [i for i in range(25) if i not in order]
        order.append(max(rest, key=lambda i: min(float(((x[i] - x[j]) ** 2).sum()) for j in order)))
    assert k_center.greedy_order(x) == order


def test_k_center_covers_better_than_chance() -> None:
    x = points(200)
    taken = k_center.greedy_order(x)[:20]
    drawn = [radius(x, np.random.default_rng(s).choice(200, 20, replace=False).tolist()) for s in range(20)]
    assert radius(x, taken) < min(drawn)


def test_k_center_takes_every_point_once_even_where_points_are_equal() -> None:
    x = np.repeat(points(6), 4, axis=0)
    order = k_center.greedy_order(x)
    assert sorted(order) == list(range(24))
    assert {i // 4 for i in order[:6]} == set(range(6)), "equal points come after all others"


def test_k_means_finds_clusters_that_are_far_apart_and_goes_round_them() -> None:
    centres = 10 * np.eye(4, 6, dtype=np.float32)
    sizes = (9, 3, 6, 12)
    x = np.concatenate([c + 0.1 * points(n, 6, seed=n) for c, n in zip(centres, sizes, strict=True)])
    truth = np.repeat(np.arange(4), sizes)
    member, distance = cluster.k_means(x, 4, 50, seed=0)
    assert len({(int(a), int(b)) for a, b in zip(truth, member, strict=True)}) == 4, "one cluster for each"
    for c in range(4):
        own = x[truth == c]
        np.testing.assert_allclose(distance[truth == c], ((own - own.mean(0)) ** 2).sum(1), atol=2e-4)


def test_the_order_of_clusters_goes_round_and_begins_at_centres(pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(some_rows(20))
    scores = cluster.score(cluster.ClusterConfig(clusters=4), pool)
    order = np.argsort(-scores, kind="stable")
    from graftlm.selection.base import embeddings

    member, distance = cluster.k_means(embeddings(pool), 4, 50, seed=0)
    assert len(set(member[order[:4]])) == 4
    for row in order[:4]:
        assert distance[row] == pytest.approx(distance[member == member[row]].min())
    sizes = np.bincount(member)
    assert [sizes[member[row]] for row in order[:4]] == sorted(sizes, reverse=True)
    assert sorted(order.tolist()) == list(range(20))


def test_the_order_of_diversity_is_the_naive_one() -> None:
    x, ridge = points(18, 4) * np.linspace(1, 2, 18)[:, None], 0.01  # of equal lengths any could be the first
    kernel = x @ x.T + ridge * np.eye(18)
    order: list[int] = []
    while len(order) < 10:
        rest = [i for i in range(18) if i not in order]
        order.append(max(rest, key=lambda i: np.linalg.slogdet(kernel[np.ix_([*order, i], [*order, i])])[1]))
    assert diversity.greedy_order(x.astype(np.float32), ridge, 10) == order


def test_diversity_orders_as_many_as_it_is_told_to_and_says_so(pool_of: Callable[..., Pool]) -> None:
    pool = pool_of(some_rows(12))
    scores = diversity.score(diversity.DiversityConfig(most=5), pool)
    assert np.isfinite(scores).sum() == 5
    assert "5 of 12" in pool.notes[0]
