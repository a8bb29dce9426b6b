"""LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation. Azizi et al. 2024,
arXiv:2406.12832, section 3.

    W' = W + s (B S A - B_0 S_0 A)        W = U S V^T        s = alpha / r

    A = V_r^T [r, d_in], frozen ("PMA");  B [d_out, r], trained, at first B_0 = U_r ("PMB")
    S [r, r], trained, at first S_0 = diag(S_r)

The paper also freezes B bit by bit in the first part of the run, its directions of the least singular values first, so
that only S learns at the end: that is the callback `lamda`; without it B learns throughout. LaMDA++ gives each layer a
rank of its own by W's spectrum: `model/spectrum.py`. The singular vectors come from a randomised range finder
with the site's seed, where the paper has an SVD, which takes minutes on a wide model. (The authors' published code
starts as LoRA does: A random, B zero, S random.)
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.linalg import top_singular_fast


@config
class LamdaConfig(DeltaConfig):
    method: Literal["lamda"] = "lamda"
    r: PositiveCount = 32
    """A layer with fewer rows or columns than this takes all its singular values."""
    alpha: PositiveRate = 32


class Lamda(AdditiveDelta):
    family = "reparameterisation"
    paper = "Azizi et al. 2024, arXiv:2406.12832"
    callbacks = ("lamda",)
    formula = "min(r, d_in, d_out) * (d_out + min(r, d_in, d_out))"
    learning_rate = 0.000125
    kinds = ("linear", "embedding")
    PMA: Tensor
    start_B: Tensor

    def __init__(self, site: Site, config: LamdaConfig) -> None:
        super().__init__(site, config)
        r = min(config.r, site.d_in, site.d_out)
        self.register_buffer("PMA", torch.zeros(r, site.d_in))
        self.register_buffer("start_B", torch.zeros(site.d_out, r))  # B_0 S_0
        self.PMB = nn.Parameter(torch.zeros(site.d_out, r))
        self.S = nn.Parameter(torch.zeros(r, r))
        self.scale = config.alpha / config.r

    def start(self) -> None:
        U, S, Vh = top_singular_fast(self.site.W(), len(self.S), self.site.generator())
        self.PMA.copy_(Vh)
        self.PMB.copy_(U)
        self.S.copy_(S.diag())
        self.start_B.copy_(U * S)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.PMA, self.scale * (self.PMB @ self.S - self.start_B)
