"""RDS+: Large-Scale Data Selection for Instruction Tuning. Ivison et al. 2025, arXiv:2503.01807, algorithm 1.

    x = sum_i i h_i / sum_i i          h_i [d]: the base's last hidden state of token i of n
    u = argmax_{j not in s} cos(x_j, y_q)        s <- s + u, for each row q of the target in turn, again and again

The mean weighted by position is that of SGPT (Muennighoff 2022, arXiv:2202.08904): with causal attention a later state
has seen more of its row. One forward pass a row, no training; the paper has it above LESS, perplexity and IFD, and most
of those below chance once pools are large.

Not as in the paper: the pool's mean is taken from x and y, since all rows share a template and would otherwise be close
to all others.
"""

from typing import Literal

import numpy as np

from graftlm.config.schema import config
from graftlm.data.sources.source import SourceConfig
from graftlm.selection.base import Pool, Scores, SelectorConfig, directions, from_order, hidden_means


@config
class RdsConfig(SelectorConfig):
    by: Literal["rds"] = "rds"
    target: str | SourceConfig
    """A few rows of the kind that is wanted; none of them may be among those that the result is measured on."""


def score(config: RdsConfig, pool: Pool) -> Scores:
    usable, target = np.flatnonzero(pool.usable), pool.other(config.target)
    points = hidden_means(pool, late=True)[usable]
    queries = hidden_means(target, late=True)[target.usable]
    centre = points.mean(0)
    return from_order(usable[turns(directions(queries, centre) @ directions(points, centre).T)], len(pool))


def turns(similarity: Scores) -> list[int]:
    """All rows of a pool in the order in which they are taken, by similarity [queries, n]: each query in turn has the
    nearest that is left; of equals the first."""
    near = np.argsort(-similarity, axis=1, kind="stable")
    place, is_used, order = np.zeros(len(near), np.int64), np.zeros(near.shape[1], bool), list[int]()
    while len(order) < near.shape[1]:
        for query in range(len(near)):
            while place[query] < near.shape[1] and is_used[near[query, place[query]]]:
                place[query] += 1
            if place[query] < near.shape[1]:
                order.append(int(near[query, place[query]]))
                is_used[order[-1]] = True
    return order
