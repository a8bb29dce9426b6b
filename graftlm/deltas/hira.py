"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models. Huang et al., ICLR 2025,
openreview.net/forum?id=TwJrTz9cRS (not on arXiv).

    dW = W * (B A), element by element        W [d_out, d_in], frozen; A [r, d_in]  B [d_out, r]

The rank of dW is up to r times that of W, at the parameters of a LoRA of rank r. A and B start as LoRA's: dW = 0. There
is no alpha. Nothing is cheaper than to build dW, so that a step costs one more product as large as W.
"""

from typing import Literal

from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, PeftLayout, Site
from graftlm.deltas.starts import lora_factors


@config
class HiraConfig(DeltaConfig):
    method: Literal["hira"] = "hira"
    r: PositiveCount = 32


class Hira(AdditiveDelta):
    family = "reparameterisation"
    paper = "Huang et al. 2025, openreview.net/forum?id=TwJrTz9cRS"
    formula = "r * (d_in + d_out)"
    learning_rate = 1.6e-2
    kinds = ("linear", "embedding")
    peft = PeftLayout(
        type="HIRA",
        tensors={"A": "hira_A", "B": "hira_B"},
        embedding={"A": "hira_embedding_A", "B": "hira_embedding_B"},
        fields={"r": "r", "dropout": "hira_dropout"},
        harmless=("rank_pattern",),  # PEFT 0.21.2 takes r at every layer, whatever its pattern says
    )

    def __init__(self, site: Site, config: HiraConfig) -> None:
        super().__init__(site, config)
        A, B = lora_factors(site, config.r, site.generator())
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def matrix(self) -> Tensor:
        return self.site.W() * (self.B @ self.A)
