"""Lily: Low-Rank Interconnected Adaptation across Layers. Zhong et al. 2024, arXiv:2407.09946.

    h = W x + s sum_e p_e B_e A x        p = softmax(R A x), one for each token        e = 1 .. num_B

    A [r, d_in]             one for `stride` layers in a row
    B_e [d_out, r]          num_B of them for all layers
    R [num_B, r]            the router of each layer

A and B are for layers with the same name and the same sizes (all query projections, say). B starts at zero, A and R as
LoRA's A. There is no alpha: s is the `scaling` itself.

The authors' code and PEFT average p over all tokens of the batch. The output for a token then depends on other rows and
on later tokens, which do not exist yet during generation. Here each token has its own p. For a single token both are
the same; for several tokens PEFT's adapters compute something else, so they are refused.
"""

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import Base, Delta, DeltaConfig, Shared, Site
from graftlm.deltas.starts import uniform_A


@config
class LilyConfig(DeltaConfig):
    method: Literal["lily"] = "lily"
    r: PositiveCount = 32
    stride: PositiveCount = 4
    """Layers in a row that share one A."""
    num_B: PositiveCount = 4
    scaling: PositiveRate = 1.0

    def __post_init__(self) -> None:
        if self.num_B < 2:
            raise ValueError("num_B is 1, and a router has nothing to choose from: make it 2 or more")

    def share(self, sites: Sequence[Site]) -> Shared:
        return Projections(self, sites)


class Projections(Shared):
    """A_k for each number of layers in a row, B_g [d_out, num_B, r] for each sort of layer."""

    def __init__(self, config: LilyConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.of: dict[str, tuple[str, str]] = {}
        """Site -> the names of its A and its B."""
        self.sizes: list[tuple[int, int, int]] = []
        """(d_in, d_out, number of A) of each sort of layer."""
        sorts: dict[tuple[str, int, int], list[Site]] = {}
        for site in sites:
            kind = re.sub(r"\.\d+\.", ".", site.name, count=1)
            sorts.setdefault((kind, site.d_in, site.d_out), []).append(site)
        number = 0
        for g, ((_, d_in, d_out), alike) in enumerate(sorts.items()):
            self.register_parameter(f"B_{g}", nn.Parameter(torch.zeros(d_out, config.num_B, config.r)))
            firsts = alike[:: config.stride]
            self.sizes.append((d_in, d_out, len(firsts)))
            for first in firsts:
                fresh = uniform_A(first, config.r, first.generator())
                self.register_parameter(f"A_{number}", nn.Parameter(fresh))
                at = alike.index(first)
                self.of |= {site.name: (f"A_{number}", f"B_{g}") for site in alike[at : at + config.stride]}
                number += 1


class Lily(Delta):
    family = "reparameterisation"
    paper = "Zhong et al. 2024, arXiv:2407.09946"
    formula = "num_B * r"
    shared_formula = "sum(r * (d_in * parts + d_out * num_B) for d_in, d_out, parts in sizes)"
    learning_rate = 8e-3
    not_mergeable = "each token mixes the B by its own weights, and no weight of the layer differs from token to token"

    def __init__(self, site: Site, config: LilyConfig) -> None:
        super().__init__(site, config)
        uniform = 2 * torch.rand(config.num_B, config.r, generator=site.generator()) - 1
        self.R = nn.Parameter(uniform / config.r**0.5)
        self.scale = config.scaling

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        shared = self.site.shared
        assert isinstance(shared, Projections)
        A, B = (shared.get_parameter(name) for name in shared.of[self.site.name])
        z = base.take(x, A)  # [.. r]
        p = torch.softmax(z @ self.R.T, dim=-1)  # [.. num_B]
        return y + self.scale * (p[..., None] * z[..., None, :]).flatten(-2) @ B.flatten(1).T
