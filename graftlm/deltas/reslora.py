"""ResLoRA: Identity Residual Mapping in Low-Rank Adaption. Shi et al. 2024, arXiv:2402.18039, equation 4.

    h_n = W_n x_n + s B_n A_n (x_n + x_{n-1})        the input shortcut

x_{n-1} is the input of the same layer of the transformer block before: A [r, d_in], B [d_out, r], s = alpha / r. In the
first block there is none. The paper removes the shortcut at inference with an estimate of its size; that is another
model, so here the shortcut stays and nothing is merged.
"""

import re
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import Base, Delta, DeltaConfig, Shared, Site
from graftlm.deltas.lora import Lora, LoraConfig


@config
class ResLoraConfig(DeltaConfig):
    method: Literal["reslora"] = "reslora"
    r: PositiveCount = 16
    alpha: PositiveRate = 32

    def share(self, sites: Sequence[Site]) -> Shared:
        return Tape(sites)


class Tape(Shared):
    """The inputs of this pass by site, and which site comes before which."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.inputs: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        self.before: dict[str, str] = {}
        last: dict[str, str] = {}
        for site in sites:
            kind = re.sub(r"\.\d+\.", ".", site.name, count=1)
            if kind in last:
                self.before[site.name] = last[kind]
            last[kind] = site.name


class ResLora(Delta):
    family = "reparameterisation"
    paper = "Shi et al. 2024, arXiv:2402.18039"
    formula = "r * (d_in + d_out)"
    learning_rate = 2e-3
    not_mergeable = "the shortcut feeds it another layer's input, which no weight of this layer sees"

    def __init__(self, site: Site, config: ResLoraConfig) -> None:
        super().__init__(site, config)
        self.lora = Lora(site, LoraConfig(r=config.r, alpha=config.alpha))

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        tape = self.site.shared
        assert isinstance(tape, Tape)
        tape.inputs[self.site.name, tape.group] = x
        before = tape.before.get(self.site.name)
        return y + self.lora.increment(x if before is None else x + tape.inputs[before, tape.group], base)
