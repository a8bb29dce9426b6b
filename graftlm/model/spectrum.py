"""Ranks by the base's spectrum: LaMDA++. Azizi et al. 2024, arXiv:2406.12832, section 3.3.

    E_l(r) = sum_{k <= r} s_k^2 / sum_k s_k^2        s_k: the singular values of W_l, falling

A layer of which few singular values hold most of the energy needs few ranks. All sites begin with one rank; each
further one goes to the site with the least E_l at its rank of then, until they have `mean` on average. So every site
ends with as nearly the same share of its energy as whole ranks and the budget allow. The paper scores candidate ranks
by the same normalized energy and picks one for each layer; its rule for ties and its list are not followed. (Its text
beyond the abstract was not at hand, and its authors' repository, ArminAzizi98/LaMDA, has LaMDA without the "++".)

A fact of the base and of no step of training, so this is no callback: it makes the `patterns` of a config.
"""

import re
from dataclasses import replace
from heapq import heapify, heapreplace
from typing import Any, TypeVar

import torch
from torch import nn

from graftlm.deltas.base import DeltaConfig
from graftlm.errors import TargetError
from graftlm.model.sites import sites_of

C = TypeVar("C", bound=DeltaConfig)


@torch.no_grad()
def ranks_by_spectrum(model: nn.Module, config: C, *, mean: int | None = None) -> C:
    """`config` with a pattern for each site: its rank by the spectrum of W, and alpha so that alpha / r stays.

    `mean` (default: the config's r) is the average over the sites. Works for any method with an `r`. Costs an SVD
    without vectors of every W: about a second for ten layers of 1,000 x 1,000. Raises TargetError for a method without
    r, for a config that has patterns, and where sites are too small for so many ranks.
    """
    any_config: Any = config
    if config.patterns:
        raise TargetError("ranks by spectrum: the config has patterns already", code="patterns-already-set")
    if not hasattr(any_config, "r"):
        raise TargetError(f"ranks by spectrum: method {config.method} has no r", code="method-without-rank")
    sites = sites_of(model, config)
    energies = [torch.linalg.svdvals(site.W()).square().cumsum(0) for site in sites]
    shares = [(energy / energy[-1].clamp_min(torch.finfo(energy.dtype).tiny)).tolist() for energy in energies]
    budget = (mean or any_config.r) * len(sites)
    if budget > sum(map(len, shares)):
        raise TargetError(
            f"ranks by spectrum: {budget} ranks do not fit: all sites together have {sum(map(len, shares))}",
            code="rank-too-large",
        )
    ranks = [1] * len(sites)
    heap = [(share[0] if len(share) > 1 else 2.0, number) for number, share in enumerate(shares)]
    heapify(heap)
    for _ in range(budget - len(sites)):
        number = heap[0][1]
        ranks[number] += 1
        has_more = ranks[number] < len(shares[number])
        heapreplace(heap, (shares[number][ranks[number] - 1] if has_more else 2.0, number))
    scaled = [{"alpha": any_config.alpha * r / any_config.r} if hasattr(any_config, "alpha") else {} for r in ranks]
    found = {re.escape(site.name): {"r": r, **alpha} for site, r, alpha in zip(sites, ranks, scaled, strict=True)}
    return replace(config, patterns=found)
