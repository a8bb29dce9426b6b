"""MBC, model-based clustering of a library: Ostapenko et al. 2024, arXiv:2405.11157, section 3.

    changes   <D_i, D_j> = sum over layers of tr(D_i^T D_j) = sum of (B_i^T B_j) * (A_i A_j^T), entry by entry
    factors   u_i = all A_i and B_i end to end; the smallest half of its entries are 0; projected on the 64 directions
              of the u_i that hold most; <u_i, u_j>
    C_ij = <i, j> / (|i| |j|);  k-means with k clusters on the rows of C

The paper then trains one adapter for each cluster on the rows of all of its tasks.

A departure: `changes` is the default. It depends on what adapters do, not on the factors in which a tool writes them:
(B R, R^-1 A) is the same adapter, and has another u. `factors` is the authors' own, for adapters of one rank and start.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.adapters.factors import Factors
from graftlm.errors import AdapterError, RecipeError
from graftlm.generation.adapter_pool import AdapterPool
from graftlm.routing.library import low_rank_factors

By = Literal["changes", "factors"]

DIRECTIONS = 64
STARTS = 10
"""Beginnings of k-means of which the best end counts."""


def clusters(
    pool: AdapterPool, k: int, *, by: By = "changes", names: Sequence[str] = (), seed: int = 0
) -> list[list[str]]:
    """The adapters of a pool (or those of `names`) in at most k groups, the largest first.

    Raises AdapterError for an adapter without factors and, with `factors`, for ranks or layers that differ; RecipeError
    for a k that is below 1 or above the number of adapters.
    """
    names = sorted(names or [one.name for one in pool.registered()])
    found = similarities({name: low_rank_factors(pool, name) for name in names}, by)
    if not 1 <= k <= len(found):
        raise RecipeError(f"{k} clusters of {len(found)} adapters: give 1 to {len(found)}", code="unusable-settings")
    labels = k_means(found, k, seed).tolist()
    groups = [[name for name, label in zip(names, labels, strict=True) if label == each] for each in range(k)]
    return sorted(filter(None, groups), key=lambda group: (-len(group), group))


@torch.no_grad()
def similarities(adapters: Mapping[str, Factors], by: By = "changes") -> Tensor:
    """C [n, n], float64: the cosine of each adapter with each."""
    products = _of_changes(adapters) if by == "changes" else _of_factors(adapters)
    sizes = products.diagonal().clamp_min(0).sqrt().clamp_min(1e-300)
    return products / sizes[:, None] / sizes


def _of_changes(adapters: Mapping[str, Factors]) -> Tensor:
    """<D_i, D_j> [n, n] over all layers; a layer that an adapter lacks is 0."""
    found = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for site in dict.fromkeys(site for factors in adapters.values() for site in factors):
        here = [(n, *factors[site]) for n, factors in enumerate(adapters.values()) if site in factors]
        A = torch.cat([A.double().cpu() for _, A, _ in here])
        B = torch.cat([B.double().cpu() for _, _, B in here], dim=1)
        of = torch.tensor([n for n, A_n, _ in here for _ in range(len(A_n))])
        both = (B.T @ B) * (A @ A.T)  # [R, R], R the sum of the ranks
        rows = torch.zeros(len(adapters), len(of), dtype=torch.float64).index_add_(0, of, both)
        found += torch.zeros_like(found).index_add_(1, of, rows)
    return found


def _of_factors(adapters: Mapping[str, Factors]) -> Tensor:
    flat = [torch.cat([t.double().cpu().flatten() for s in sorted(f) for t in f[s]]) for f in adapters.values()]
    forms = {tuple((site, *f[site][0].shape, *f[site][1].shape) for site in sorted(f)) for f in adapters.values()}
    if len(forms) > 1:
        raise AdapterError(
            "the adapters have other layers or ranks than each other, so their factors cannot be compared: compare "
            "what they change (by changes)",
            code="ranks-differ",
        )
    u = torch.stack([torch.where(v.abs() > v.abs().median(), v, 0.0) for v in flat])
    U, S, _ = torch.linalg.svd(u, full_matrices=False)
    projected: Tensor = U[:, :DIRECTIONS] * S[:DIRECTIONS]
    return projected @ projected.T


def k_means(points: Tensor, k: int, seed: int) -> Tensor:
    """The cluster of each point [n, d], from 0, by Lloyd's algorithm from the best of several k-means++ starts."""
    random, best, least = torch.Generator().manual_seed(seed), torch.zeros(len(points), dtype=torch.long), float("inf")
    for _ in range(STARTS):
        labels, error = _lloyd(points, _spread_out(points, k, random))
        if error < least - 1e-12:
            best, least = labels, error
    return best


def _spread_out(points: Tensor, k: int, random: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): the next center is drawn by the squared distance to the nearest."""
    chosen = [int(torch.randint(len(points), (), generator=random))]
    for _ in range(k - 1):
        distances = torch.cdist(points, points[chosen]).min(1).values.square()
        weights = distances if float(distances.sum()) > 0 else torch.ones_like(distances)
        chosen.append(int(torch.multinomial(weights, 1, generator=random)))
    return points[chosen]


def _lloyd(points: Tensor, centers: Tensor) -> tuple[Tensor, float]:
    labels = torch.full((len(points),), -1)
    while True:
        distances = torch.cdist(points, centers)
        new = distances.argmin(1)
        if torch.equal(new, labels):
            return labels, float(distances.gather(1, labels[:, None]).square().sum())
        labels = new
        kept = [
            points[labels == each].mean(0) if bool((labels == each).any()) else centers[each]
            for each in range(len(centers))
        ]
        centers = torch.stack(kept)
