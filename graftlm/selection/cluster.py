"""Clusters: k-means over embeddings, and from each cluster in turn the row nearest to its centre.

    argmin over c_1 ... c_k of  sum_i min_j |x_i - c_j|^2        x_i [d]: the embedding of row i, c_j [d]: a centre

As From Quantity to Quality (Li et al. 2023, arXiv:2308.12032, section 2.1: 100 clusters, 10 rows of each) and Maybe
Only 0.5% Data Is Needed (Chen et al. 2023, arXiv:2305.09246) begin. The order goes round the clusters, the largest
first, so that any number of rows is spread over all of them. Seeds by k-means++ (Arthur and Vassilvitskii 2007).
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graftlm.config.schema import Count, PositiveCount, config
from graftlm.selection.base import Pool, Scores, SelectorConfig, embeddings, from_order


@config
class ClusterConfig(SelectorConfig):
    by: Literal["cluster"] = "cluster"
    clusters: PositiveCount = 100
    rounds: PositiveCount = 50
    """Of k-means, at most; it ends when no row changes its cluster."""
    seed: Count = 0


def score(config: ClusterConfig, pool: Pool) -> Scores:
    usable = np.flatnonzero(pool.usable)
    points = embeddings(pool)[usable]
    member, distance = k_means(points, min(config.clusters, len(points)), config.rounds, config.seed)
    sizes = np.bincount(member)
    by_distance = np.argsort(distance, kind="stable")
    turn = np.empty(len(points), np.int64)
    turn[by_distance] = _count_before(member[by_distance])
    order = np.lexsort((member, -sizes[member], turn))
    return from_order(usable[order], len(pool))


def _count_before(member: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows of the same cluster stand before each: [n]."""
    found, counts = np.zeros(len(member), np.int64), np.zeros(member.max() + 1, np.int64)
    for place, cluster in enumerate(member):
        found[place] = counts[cluster]
        counts[cluster] += 1
    return found


def k_means(points: Scores, k: int, rounds: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The cluster of each of points [n, d], and its squared distance from that cluster's centre: two of [n]."""
    generator = np.random.default_rng(seed)
    centres = points[[int(generator.integers(len(points)))]]
    while len(centres) < k:  # far rows are likelier
        chance = _distances(points, centres).min(1).astype(np.float64)
        chance = chance if chance.sum() > 0 else np.ones(len(points))
        centres = np.concatenate([centres, points[[int(generator.choice(len(points), p=chance / chance.sum()))]]])
    member = np.full(len(points), -1)
    for _ in range(rounds):
        before, member = member, _distances(points, centres).argmin(1)
        if np.array_equal(before, member):
            break
        for cluster in np.unique(member):
            centres[cluster] = points[member == cluster].mean(0)
    distances = _distances(points, centres)
    member = distances.argmin(1)
    return member, distances.min(1)


def _distances(points: Scores, centres: Scores) -> NDArray[np.float32]:
    """Squared distances [n, k]."""
    squares = np.square(points).sum(1)[:, None] + np.square(centres).sum(1)
    found: NDArray[np.float32] = np.maximum(squares - 2 * points @ centres.T, 0)
    return found
