"""Diversity by a determinantal point process, greedily: Fast Greedy MAP Inference. Chen et al. 2018, arXiv:1709.05135,
algorithm 1.

    j = argmax_i log det(L_{s + i}) - log det(L_s)        s <- s + j        L = X X^T + e I    X [n, d]: embeddings

The next row is the one that adds most volume: what lies in the span of those taken adds next to none, so near
duplicates come last. With Cholesky factors a step costs n times the rows taken so far:

    d_i^2 = det(L_{s + i}) / det(L_s)        e_i = (L_ji - c_j . c_i) / d_j        c_i <- [c_i, e_i]    d_i^2 -= e_i^2
"""

from typing import Literal

import numpy as np

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.selection.base import Pool, Scores, SelectorConfig, embeddings, from_order


@config
class DiversityConfig(SelectorConfig):
    by: Literal["diversity"] = "diversity"
    most: PositiveCount = 1000
    """Only so many rows are put in order, and the others left out: memory is this times all rows, in float32."""
    ridge: PositiveRate = 0.01
    """e above: what a row adds even where embeddings have no direction left."""


def score(config: DiversityConfig, pool: Pool) -> Scores:
    usable = np.flatnonzero(pool.usable)
    order = greedy_order(embeddings(pool)[usable], config.ridge, min(config.most, len(usable)))
    if len(order) < len(usable):
        pool.notes.append(f"diversity puts {len(order)} of {len(usable)} rows in order: `most` sets how many")
    return from_order(usable[order], len(pool))


def greedy_order(points: Scores, ridge: float, count: int) -> list[int]:
    """The first `count` rows of points [n, d] in the order in which they are taken; of equals the first."""
    gain = np.square(points).sum(1).astype(np.float64) + ridge
    factors = np.zeros((count, len(points)), np.float32)
    order: list[int] = []
    for step in range(count):
        best = int(gain.argmax())
        similarity = points @ points[best]
        similarity[best] += ridge
        factors[step] = (similarity - factors[:step].T @ factors[:step, best]) / np.sqrt(gain[best])
        gain -= np.square(factors[step])
        gain[[*order, best]] = -np.inf
        order.append(best)
    return order
