"""EigenLoRAx: Recycling Adapters to Find Principal Subspaces. Kaushik et al. 2025, arXiv:2502.04700, section 3, alg. 1.

    h = W x + B A x        A = a_A V_A        B = V_B a_B

    V_A [k, d_in], V_B [d_out, k]: orthonormal, frozen, the principal directions of adapters that were trained before
    a_A [r, k], a_B [k, r]: trained coefficients        k = components

`principal_directions` finds V_A and V_B of one site in the (A, B) of trained LoRAs; copy them into the delta's buffers.
Without adapters to recycle, a fresh delta has random orthonormal directions: what the paper adds to its principal ones
where adapters are few, here for all of them. a_B starts at zero, so that dW = 0 (the authors start from the
coefficients of one recycled adapter, or from random ones); a_A makes A as large as LoRA's, and at an embedding as large
as a one-hot x wants it (`starts.py`).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.linalg import orthonormal, top_singular
from graftlm.deltas.starts import fan_in


@config
class EigenLoraxConfig(DeltaConfig):
    method: Literal["eigenlorax"] = "eigenlorax"
    r: PositiveCount = 8
    components: PositiveCount = 64
    """How many directions on each side; a layer with fewer rows or columns than this has as many as it has of those."""


class EigenLorax(AdditiveDelta):
    family = "reparameterisation"
    paper = "Kaushik et al. 2025, arXiv:2502.04700"
    formula = "r * (min(components, d_in) + min(components, d_out))"
    kinds = ("linear", "embedding")
    learning_rate = 2e-2
    V_A: Tensor
    V_B: Tensor

    def __init__(self, site: Site, config: EigenLoraxConfig) -> None:
        super().__init__(site, config)
        self.components = config.components
        k_A, k_B = min(config.components, site.d_in), min(config.components, site.d_out)
        self.register_buffer("V_A", torch.zeros(k_A, site.d_in))
        self.register_buffer("V_B", torch.zeros(site.d_out, k_B))
        a_A = 2 * torch.rand(config.r, k_A, generator=site.generator()) - 1
        self.a_A = nn.Parameter(a_A * (site.d_in / fan_in(site) / k_A) ** 0.5)
        self.a_B = nn.Parameter(torch.zeros(k_B, config.r))

    def start(self) -> None:
        nothing = (torch.zeros(0, self.site.d_in), torch.zeros(self.site.d_out, 0))
        V_A, V_B = principal_directions([nothing], self.components, self.site.generator())
        self.V_A.copy_(V_A)
        self.V_B.copy_(V_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a_A @ self.V_A, self.V_B @ self.a_B


def principal_directions(
    factors: Sequence[tuple[Tensor, Tensor]], k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(A [r, d_in], B [d_out, r]) of several adapters at one site -> (V_A [k, d_in], V_B [d_out, k]).

    The rows of all A, and the columns of all B, less their mean, have V_A and V_B for their first principal components;
    where they span fewer than k directions, random orthonormal ones follow.
    """
    V_A = _components(torch.cat([A for A, _ in factors]).T, k, generator)
    return V_A.T, _components(torch.cat([B for _, B in factors], dim=1), k, generator)


def _components(columns: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """[d, n] -> [d, min(k, d)]"""
    d = len(columns)
    random = torch.randn(d, min(k, d), generator=generator).to(columns)
    if not columns.shape[1]:
        return orthonormal(random)
    U, S, _ = top_singular(columns - columns.mean(1, keepdim=True), k)
    found = U[:, S.gt(1e-6 * S.max())]
    return orthonormal(torch.cat([found, random], dim=1)[:, : min(k, d)])
