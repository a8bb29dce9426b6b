"""NLoRA: Nystroem-Initiated Low-Rank Adaptation for LLMs. Guo et al. 2025, arXiv:2502.14482, section 3.

    h = W x + s B N A x        A [r, d_in]  N [r, r]  B [d_out, r]        s = alpha / r

    train: all             StructuredLoRA: A and N random (Kaiming-uniform), B at first 0. NLoRA proper is this with
                           `init: nystrom`. At an embedding A and B start as LoRA's there
    train: intermediate    IntTune: only N is trained. A = W[:r, :] and B = W[:, :r], frozen; N at first 0

The paper starts IntTune at N = N0, the block of W that A and B share (or its pseudo-inverse, as Nystroem has it). Here
B N0 A is taken out of W, so that the fresh delta is the base: then B (N - N0) A from N = N0 and B N A from N = 0 are
the same function of the steps that N makes, whatever N0 is, and 0 is what we start from.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.starts import lora_factors


@config
class NloraConfig(DeltaConfig):
    method: Literal["nlora"] = "nlora"
    r: PositiveCount = 16
    """Where only N is trained, a layer with fewer rows or columns than this takes all of them."""
    alpha: PositiveRate = 16
    train: Literal["all", "intermediate"] = "all"


class Nlora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Guo et al. 2025, arXiv:2502.14482"
    formula = "rank * rank + (0 if frozen else rank * (d_in + d_out))"
    learning_rate = 8e-3
    kinds = ("linear", "embedding")
    A: Tensor
    B: Tensor

    def __init__(self, site: Site, config: NloraConfig) -> None:
        super().__init__(site, config)
        self.frozen = config.train == "intermediate"
        self.rank = r = min(config.r, site.d_in, site.d_out) if self.frozen else config.r
        draw = site.generator()
        A, B = lora_factors(site, r, draw)
        N = (2 * torch.rand(r, r, generator=draw) - 1) / r**0.5
        if self.frozen:
            self.register_buffer("A", A)
            self.register_buffer("B", B)
            N.zero_()
        else:
            self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.N = nn.Parameter(N)
        self.scale = config.alpha / config.r

    def start(self) -> None:
        if self.frozen:
            W = self.site.W()
            self.A.copy_(W[: self.rank])
            self.B.copy_(W[:, : self.rank])

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * (self.B @ self.N)
