"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al. 2024, arXiv:2402.09353, equation 5.

    W' = m * V / ||V||        V = W + s B A      || || the norm of each row (the paper writes W transposed: columns)

    A [r, d_in]  B [d_out, r]  m [d_out], at first ||W||      s = alpha / r

The norm counts as a constant in the backward pass (section 4.3). Training never builds V: its norm comes from ||W||^2,
W A^T and A A^T. Section 5.6 learns the magnitude m of more layers than the direction
B A, for fewer parameters: that is `directions`.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Flag, PositiveCount, PositiveRate, config
from graftlm.deltas.base import AroundDelta, Base, DeltaConfig, PeftLayout, Site, Targets, matches, once
from graftlm.deltas.lora import Lora, LoraConfig


@config
class DoraConfig(DeltaConfig):
    method: Literal["dora"] = "dora"
    r: PositiveCount = 16
    alpha: PositiveRate = 32
    rslora: Flag = False
    directions: Targets | None = None
    """Which of the targets learn a direction B A too; all of them by default, the others learn m alone."""


class Dora(AroundDelta):
    family = "reparameterisation"
    paper = "Liu et al. 2024, arXiv:2402.09353"
    formula = "(r * (d_in + d_out) if turns else 0) + d_out"
    learning_rate = 2e-3
    kinds = ("linear", "embedding")
    peft = PeftLayout(
        type="LORA",
        tensors={"V.A": "lora_A.weight", "V.B": "lora_B.weight", "m": "lora_magnitude_vector"},
        embedding={"V.A": "lora_embedding_A", "V.B": "lora_embedding_B", "m": "lora_magnitude_vector"},
        fields=Lora.peft.fields,
        patterns=Lora.peft.patterns,
        constants={"use_dora": True},
        defaults={**Lora.peft.defaults, "use_dora": False},
        why_not=lambda config: "PEFT has one list of targets for m and B A" if config.directions is not None else "",
    )

    def __init__(self, site: Site, config: DoraConfig) -> None:
        super().__init__(site, config)
        self.turns = config.directions is None or matches(config.directions, site.name)
        self.V = Lora(site, LoraConfig(r=config.r, alpha=config.alpha, rslora=config.rslora)) if self.turns else None
        self.m = nn.Parameter(torch.ones(site.d_out))

    def start(self) -> None:
        self.m.copy_(self.site.W().norm(dim=1))

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        V = W if self.V is None else W + self.V.matrix()
        return (self.m / V.detach().norm(dim=1))[:, None] * V, b

    def inside(self) -> tuple[Tensor, Tensor] | None:
        return None if self.V is None else self.V.factors()

    def output(self, z: Tensor, x: Tensor, base: Base) -> Tensor:
        gain = self._gain(base)
        return z * gain if base.bias is None else (z - base.bias) * gain + base.bias

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        factors = self.inside()
        return super().forward(x, y, base) if factors is None else base.low_rank(x, *factors, gain=self._gain(base))

    @once
    def _gain(self, base: Base) -> Tensor:
        return self.m / (base.row_norms() if self.V is None else base.row_norms(*self.V.factors()))
