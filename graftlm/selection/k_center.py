"""k-center: Active Learning for Convolutional Neural Networks: A Core-Set Approach. Sener and Savarese 2018,
arXiv:1708.00489, algorithm 1.

    u = argmax_i min_{j in s} |x_i - x_j|        s <- s + u, again and again        x_i [d]: the embedding of row i

The greedy order: the row that is farthest from all that were taken comes next. However many are kept, the largest
distance from any row to the nearest kept one is at most twice the least that is possible. The paper begins with rows
that are labelled already; here the first is the one nearest to the mean.
"""

from typing import Literal

import numpy as np

from graftlm.config.schema import config
from graftlm.selection.base import Pool, Scores, SelectorConfig, embeddings, from_order


@config
class KCenterConfig(SelectorConfig):
    by: Literal["k-center"] = "k-center"


def score(config: KCenterConfig, pool: Pool) -> Scores:
    usable = np.flatnonzero(pool.usable)
    return from_order(usable[greedy_order(embeddings(pool)[usable])], len(pool))


def greedy_order(points: Scores) -> list[int]:
    """All rows of points [n, d] in the order in which the greedy algorithm takes them; of equals the first."""
    order = [int(np.square(points - points.mean(0)).sum(1).argmin())]
    nearest = np.full(len(points), np.inf)
    for _ in range(len(points) - 1):
        nearest = np.minimum(nearest, np.square(points - points[order[-1]]).sum(1))
        nearest[order[-1]] = -1  # taken: farther than no other
        order.append(int(nearest.argmax()))
    return order
