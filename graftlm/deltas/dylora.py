"""DyLoRA: Dynamic Search-Free Low-Rank Adaptation. Valipour et al. 2022, arXiv:2210.07558, section 3.

    h = W x + (alpha / b) B[:, :b] A[:b] x        A [r, d_in]  B [d_out, r]        1 <= b <= r

LoRA of which the first b ranks are used. The callback `dylora` draws b anew for every training step, so that the first
ranks learn to do with few, and any b is good afterwards: `rank` in the config says which (None: all r), and
`graftlm.callbacks.dylora.use_rank` changes it on a model. A and B start as LoRA's.
"""

from typing import Literal

from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.starts import lora_factors
from graftlm.errors import TargetError


@config
class DyLoraConfig(DeltaConfig):
    method: Literal["dylora"] = "dylora"
    r: PositiveCount = 16
    alpha: PositiveRate = 32
    rank: PositiveCount | None = None
    """How many of the r ranks are used, the first ones; all where nothing is said."""


class DyLora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Valipour et al. 2022, arXiv:2210.07558"
    callbacks = ("dylora",)
    formula = "r * (d_in + d_out)"
    learning_rate = 2e-3
    kinds = ("linear", "embedding")

    def __init__(self, site: Site, config: DyLoraConfig) -> None:
        super().__init__(site, config)
        A, B = lora_factors(site, config.r, site.generator())
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.alpha = config.alpha
        self.use(config.rank)

    def use(self, rank: int | None) -> None:
        """Use the first `rank` ranks from now on, all where it is None."""
        r = len(self.A)
        if rank is not None and not 1 <= rank <= r:
            raise TargetError(
                f"rank: {rank} of a DyLoRA of r = {r}: it can be cut to anything from 1 to {r}",
                code="rank-out-of-range",
            )
        self.rank = rank or r
        self.scale = self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A[: self.rank], self.scale * self.B[:, : self.rank]
