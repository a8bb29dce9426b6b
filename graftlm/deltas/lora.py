"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, arXiv:2106.09685, equation 3.

    h = W x + s B A x        A [r, d_in]  B [d_out, r]  W [d_out, d_in], frozen
    s = alpha / r            section 4.1
    s = alpha / sqrt(r)      rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, section 4: keeps the size of the
                             increment the same as r grows

A starts random and B at zero, so that dW = 0. The paper draws A from a Gaussian; the authors' code, PEFT and we draw
it from U(-1/sqrt(d_in), 1/sqrt(d_in)). At an embedding all three have A = 0 and B ~ N(0, 1).
"""

from typing import Literal

from torch import Tensor, nn

from graftlm.config.schema import Flag, PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, PeftLayout, Site
from graftlm.deltas.starts import lora_factors


@config
class LoraConfig(DeltaConfig):
    """LoRA: a low-rank change of each layer, dW = (alpha / r) B A. A wrong value raises a ValueError."""

    method: Literal["lora"] = "lora"
    r: PositiveCount = 16
    alpha: PositiveRate = 32
    rslora: Flag = False


class Lora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Hu et al. 2021, arXiv:2106.09685"
    formula = "r * (d_in + d_out)"
    learning_rate = 2e-3
    kinds = ("linear", "embedding")
    peft = PeftLayout(
        type="LORA",
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
        embedding={"A": "lora_embedding_A", "B": "lora_embedding_B"},
        fields={"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dropout": "lora_dropout"},
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
        constants={"use_dora": False},
        defaults={"r": 8, "lora_alpha": 8},
    )

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        A, B = lora_factors(site, config.r, site.generator())
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale = config.alpha / (config.r**0.5 if config.rslora else config.r)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * self.B
