"""TSV-Merge: Gargiulo et al. 2024, arXiv:2412.00081, section 4.2 and algorithm 1.

    M_i = P_i S_i Q_i^T        P = [P_1 ..], S = diag(w_1 S_1, ..), Q = [Q_1 ..]: the first triples of each
    M = P* S Q*^T              X* = Y Z^T of the SVD X = Y L Z^T: the orthonormal matrix nearest to X

Singular vectors of different adapters no longer overlap. The paper keeps 1/n of min(m, n) triples of each of n models;
a LoRA has fewer than that, so here `keep` is a share of an adapter's own triples, and 1 keeps all. Where the stacked
vectors are dependent (adapters that share A), Y Z^T takes only singular values above 0: the others have no determined
vectors. Every space of products gives the same.
"""

from collections.abc import Sequence
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.core import numerical_rank
from graftlm.combine.rules.base import PositiveShare, Rule, RuleConfig
from graftlm.config.schema import config


def nearest_isometry(X: Tensor) -> Tensor:
    """Y Z^T of X = Y L Z^T, over the singular values above 0."""
    Y, L, Zh = torch.linalg.svd(X, full_matrices=False)
    r = numerical_rank(L)
    isometry: Tensor = Y[:, :r] @ Zh[:r]
    return isometry


@config
class TsvConfig(RuleConfig):
    name: Literal["tsv"] = "tsv"
    keep: PositiveShare = 1.0
    """The share of each adapter's singular triples that is kept."""


class Tsv(Rule):
    paper = "Gargiulo et al. 2024, arXiv:2412.00081"

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        P, S, Q = list[Tensor](), list[Tensor](), list[Tensor]()
        for M, weight in zip(matrices, weights, strict=True):
            left, values, right = torch.linalg.svd(M, full_matrices=False)
            k = ceil(self.config.keep * numerical_rank(values))
            P.append(left[:, :k])
            S.append(weight * values[:k])
            Q.append(right[:k].T)
        return nearest_isometry(torch.cat(P, 1)) * torch.cat(S) @ nearest_isometry(torch.cat(Q, 1)).T
