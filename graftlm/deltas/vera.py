"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko et al. 2023, arXiv:2310.11454, equation 2.

    h = W x + diag(b) B diag(d) A x       A [r, D_in]  B [D_out, r], random, frozen, one pair for all sites
                                          b [d_out], at first 0; d [r], at first 0.1

Each site takes the corner of A and B that has its sizes. A and B are Kaiming-uniform (section 3.2), with a gain of 1:
what goes through keeps its size. PEFT has a gain of sqrt(2) for each, so that its B A is twice as large. As b starts at
zero that is a matter of the rate alone: twice PEFT's rate does here to b what PEFT's does there.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, PeftLayout, Shared, Site


@config
class VeraConfig(DeltaConfig):
    method: Literal["vera"] = "vera"
    r: PositiveCount = 256
    d_initial: PositiveRate = 0.1

    def share(self, sites: Sequence[Site]) -> Shared:
        return Projections(self.r, max(s.d_in for s in sites), max(s.d_out for s in sites), sites[0].generator())


class Projections(Shared):
    """A [r, D_in] and B [D_out, r]."""

    A: Tensor
    B: Tensor

    def __init__(self, r: int, D_in: int, D_out: int, generator: torch.Generator) -> None:
        super().__init__()
        for name, shape in (("A", (r, D_in)), ("B", (D_out, r))):
            uniform = 2 * torch.rand(shape, generator=generator) - 1
            self.register_buffer(name, uniform * (3 / shape[1]) ** 0.5)


class Vera(AdditiveDelta):
    family = "reparameterisation"
    paper = "Kopiczko et al. 2023, arXiv:2310.11454"
    formula = "d_out + r"
    learning_rate = 0.128
    peft = PeftLayout(
        type="VERA",
        tensors={"b": "vera_lambda_b", "d": "vera_lambda_d"},
        fields={"r": "r", "d_initial": "d_initial", "dropout": "vera_dropout"},
        constants={"bias": "none", "save_projection": True},
        harmless=("projection_prng_key",),
        shared={"A": "vera_A", "B": "vera_B"},
    )

    def __init__(self, site: Site, config: VeraConfig) -> None:
        super().__init__(site, config)
        self.b = nn.Parameter(torch.zeros(site.d_out))
        self.d = nn.Parameter(torch.full((config.r,), float(config.d_initial)))

    def factors(self) -> tuple[Tensor, Tensor]:
        shared = self.site.shared
        assert isinstance(shared, Projections)
        A, B = shared.A[:, : self.site.d_in], shared.B[: self.site.d_out]
        return self.d[:, None] * A, self.b[:, None] * B
