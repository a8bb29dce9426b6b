"""LoRA-LEGO: Zhao et al. 2024, arXiv:2409.16167: clusters of rank-one units.

    w_i M_i = sum_j b_j a_j^T        s_j = (a_j, b_j)        the units of all adapters, n_units of them
    m_c = mean of the s_j of cluster c of k-means, times mean ||s_j|| / ||mean s_j||
    M = sqrt(r / k) sum_c b_c a_c^T        (a_c, b_c) = m_c

A mean of vectors is shorter than they are, and a sum of k units varies more than one of r: these are the two factors.
r is the largest rank of the adapters, and k = r if `clusters` is not given. k = n_units is the weighted sum, times
sqrt(r / k).

Departures. The paper takes the rows of A and the columns of B, and another form (B R, R^-1 A) of the same adapter has
other units. Ours are those of the SVD, a_j = sqrt(S_j) q_j and b_j = sqrt(S_j) p_j. (a, b) and (-a, -b) are one unit,
so distances are min ||s -+ m||. Centers start at the unit that is farthest from the others so far, the longest first,
so nothing is drawn, and every space of products gives the same. The two factors are as public code has them (read in
2026, not compared with the paper's equations); it clusters units with a_j and b_j of norm 1, and takes the largest
entry in place of the norm.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.core import numerical_rank
from graftlm.combine.rules.base import Rule, RuleConfig
from graftlm.config.schema import Flag, PositiveCount, config

ROUNDS = 100


@config
class LegoConfig(RuleConfig):
    name: Literal["lego"] = "lego"
    clusters: PositiveCount | None = None
    """The k of k-means, which is the rank of the result. Without it, the largest rank of the adapters at each layer."""
    rescale: Flag = True
    """Whether the result is multiplied by sqrt(r / k)."""


class Lego(Rule):
    paper = "Zhao et al. 2024, arXiv:2409.16167"

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        each = [units(w * M) for M, w in zip(matrices, weights, strict=True)]
        pool = torch.cat(each)
        r = max(map(len, each))
        found = clusters(pool, min(self.config.clusters or r, len(pool)))
        centers = torch.stack([center(members) for members in found])
        A, B = centers.split([matrices[0].shape[1], matrices[0].shape[0]], dim=1)
        scale = (r / len(found)) ** 0.5 if self.config.rescale else 1.0
        made: Tensor = scale * (B.T @ A)
        return made


def units(M: Tensor) -> Tensor:
    """The rows (a_j, b_j) [r, n + m] of M [m, n] = sum_j b_j a_j^T, the longest first."""
    P, S, Qh = torch.linalg.svd(M, full_matrices=False)
    r = numerical_rank(S)
    root = S[:r].sqrt()[:, None]
    return torch.cat([root * Qh[:r], root * P[:, :r].T], dim=1)


def center(members: Tensor) -> Tensor:
    """The mean of units, as long as they are in the mean."""
    mean = members.mean(0)
    as_long: Tensor = mean * members.norm(dim=1).mean() / mean.norm().clamp_min(1e-300)
    return as_long


def clusters(pool: Tensor, k: int) -> list[Tensor]:
    """The units [n, d] of each of k clusters, each unit with the sign that brings it nearer to the others of its own.

    Lloyd's iterations for sum_j min_c min(||s_j - m_c||, ||s_j + m_c||)^2. A cluster that becomes empty is left out.
    """
    if k == len(pool):
        return list(pool.split(1))
    chosen = [int(pool.norm(dim=1).argmax())]
    while len(chosen) < k:
        chosen.append(int(_distances(pool, pool[chosen]).amin(1).argmax()))
    means = pool[chosen]
    own = torch.full((len(pool),), -1)
    for _ in range(ROUNDS):
        before, own = own, _distances(pool, means).argmin(1)
        if torch.equal(own, before):
            break
        signed = torch.where((pool * means[own]).sum(1) < 0, -1.0, 1.0)[:, None] * pool
        means = torch.stack([signed[own == c].mean(0) if bool((own == c).any()) else means[c] for c in range(k)])
    return [signed[own == c] for c in range(k) if bool((own == c).any())]


def _distances(pool: Tensor, means: Tensor) -> Tensor:
    """min ||s -+ m||^2 [n, k]."""
    return pool.square().sum(1)[:, None] + means.square().sum(1) - 2 * (pool @ means.T).abs()
