"""DVoRA: DoRA on VeRA. Liu et al. 2024, arXiv:2402.09353, section 5.4 (compatibility with other variants of LoRA).

    W' = m * V / ||V||        V = W + diag(b) B diag(d) A        || || the norm of each row

    A [r, D_in]  B [D_out, r]  random, frozen, one pair for all sites; each takes the corner that has its sizes
    m [d_out], at first ||W||        b [d_out], at first 0        d [r], at first 0.1

The magnitude of DoRA, with the increment of VeRA (Kopiczko et al. 2023, arXiv:2310.11454) for its direction. As in
DoRA the norm counts as a constant in the backward pass (section 4.3).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AroundDelta, Base, DeltaConfig, Shared, Site, once
from graftlm.deltas.vera import Vera, VeraConfig


@config
class DvoraConfig(DeltaConfig):
    method: Literal["dvora"] = "dvora"
    r: PositiveCount = 256
    d_initial: PositiveRate = 0.1

    def share(self, sites: Sequence[Site]) -> Shared:
        return VeraConfig(r=self.r).share(sites)


class Dvora(AroundDelta):
    family = "reparameterisation"
    paper = "Liu et al. 2024, arXiv:2402.09353"
    formula = "2 * d_out + r"
    learning_rate = 0.064

    def __init__(self, site: Site, config: DvoraConfig) -> None:
        super().__init__(site, config)
        self.V = Vera(site, VeraConfig(r=config.r, d_initial=config.d_initial))
        self.m = nn.Parameter(torch.ones(site.d_out))

    def start(self) -> None:
        self.m.copy_(self.site.W().norm(dim=1))

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        V = W + self.V.matrix()
        return (self.m / V.detach().norm(dim=1))[:, None] * V, b

    def inside(self) -> tuple[Tensor, Tensor]:
        return self.V.factors()

    def output(self, z: Tensor, x: Tensor, base: Base) -> Tensor:
        gain = self._gain(base)
        return z * gain if base.bias is None else (z - base.bias) * gain + base.bias

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *self.inside(), gain=self._gain(base))

    @once
    def _gain(self, base: Base) -> Tensor:
        return self.m / base.row_norms(*self.inside())
