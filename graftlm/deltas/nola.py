"""NOLA: Compressing LoRA using Linear Combination of Random Basis. Koohpayegani et al. 2023, arXiv:2310.02556, 3.

    h = W x + s B A x        A = sum_i a_i A_i        B = sum_i b_i B_i        s = alpha / r

    A_i [r, d_in], B_i [d_out, r], random, frozen, made again from the seed; a [bases], b [bases], trained

The number of parameters depends neither on r nor on the width of the model. One set of bases serves all sites, each of
which takes the corner that has its sizes: the paper's cheaper form; a set for each site would not fit in memory. b
starts at zero, so that dW = 0. As in the authors' code the entries of the bases are U(-1, 1) / sqrt(bases). That code
starts from a = 0 on top of a frozen A_0 drawn like LoRA's A; here, as in the equation, A is the combination alone, and
a ~ N(0, 1 / d_in), which makes A as large as LoRA's; at an embedding a ~ N(0, 1), for a one-hot x.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Shared, Site
from graftlm.deltas.starts import fan_in


@config
class NolaConfig(DeltaConfig):
    method: Literal["nola"] = "nola"
    r: PositiveCount = 8
    alpha: PositiveRate = 8
    bases: PositiveCount = 128
    """How many matrices each factor is a combination of."""

    def share(self, sites: Sequence[Site]) -> Shared:
        return NolaBases(self, max(s.d_in for s in sites), max(s.d_out for s in sites), sites[0].generator())


class NolaBases(Shared):
    """A [bases, D_in, r], transposed so that each site's corner is read in one stride, and B [bases, D_out, r]."""

    A: Tensor
    B: Tensor

    def __init__(self, config: NolaConfig, D_in: int, D_out: int, generator: torch.Generator) -> None:
        super().__init__()
        for name, D in (("A", D_in), ("B", D_out)):
            uniform = 2 * torch.rand(config.bases, D, config.r, generator=generator) - 1
            self.register_buffer(name, uniform / config.bases**0.5, persistent=False)


class Nola(AdditiveDelta):
    family = "reparameterisation"
    paper = "Koohpayegani et al. 2023, arXiv:2310.02556"
    formula = "2 * bases"
    kinds = ("linear", "embedding")
    learning_rate = 2e-2

    def __init__(self, site: Site, config: NolaConfig) -> None:
        super().__init__(site, config)
        self.a = nn.Parameter(torch.randn(config.bases, generator=site.generator()) / fan_in(site) ** 0.5)
        self.b = nn.Parameter(torch.zeros(config.bases))
        self.scale = config.alpha / config.r

    def factors(self) -> tuple[Tensor, Tensor]:
        shared = self.site.shared
        assert isinstance(shared, NolaBases)
        A = combined(self.a, shared.A, self.site.d_in)
        return A.T, self.scale * combined(self.b, shared.B, self.site.d_out)


def combined(coefficients: Tensor, bases: Tensor, d: int) -> Tensor:
    """The sum over the bases [bases, D, r] of their first d rows, [d, r]: one product of a vector and a matrix."""
    return (coefficients @ bases[:, :d].flatten(1)).view(d, -1)
