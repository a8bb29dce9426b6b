"""Block-LoRA: One Head Eight Arms, Block Matrix based Low Rank Adaptation. Zhou et al. 2025, arXiv:2501.16720, 3.

    h = W x + s (B_1 + ... + B_n) A x        A [r / n, d_in]  B_i [d_out, r / n]  n = blocks        s = alpha / r

A LoRA of rank r is cut into n blocks, B = [B_1 .. B_n] and A = [A_1; ..; A_n], and all A_i are tied to one: a product
for each block becomes a sum of the B_i. A and all B_i start as LoRA's A and B.

Equal B_i have equal gradients, so they stay equal: this is a LoRA of rank r / n whose B takes steps n times as large.
The B_i lie beside each other in B [d_out, r], as the paper has them.
"""

from typing import Literal

from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.starts import lora_factors


@config
class BlockLoraConfig(DeltaConfig):
    method: Literal["block-lora"] = "block-lora"
    r: PositiveCount = 16
    """The columns of B; a multiple of `blocks`."""
    alpha: PositiveRate = 32
    blocks: PositiveCount = 2

    def __post_init__(self) -> None:
        if self.r % self.blocks:
            raise ValueError(f"r is {self.r}, which {self.blocks} blocks cannot share equally: make it a multiple")


class BlockLora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Zhou et al. 2025, arXiv:2501.16720"
    formula = "r // blocks * d_in + r * d_out"
    learning_rate = 2e-3
    kinds = ("linear", "embedding")

    def __init__(self, site: Site, config: BlockLoraConfig) -> None:
        super().__init__(site, config)
        self.blocks = config.blocks
        A, B = lora_factors(site, config.r // self.blocks, site.generator(), columns=config.r)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale = config.alpha / config.r

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * self.B.unflatten(1, (self.blocks, -1)).sum(1)
