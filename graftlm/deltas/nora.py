"""NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models. Lin et al. 2024, arXiv:2408.10280, 3.

    W' = W + B_outer (B_inner A_inner - B_0 A_0) A_outer        W = U S V^T

    A_outer = V_r^T [r, d_in], B_outer = U_r [d_out, r], frozen
    A_inner [inner, r] and B_inner [r, inner], trained, at first A_0 and B_0: the first rows and columns of sqrt(S_r)

A LoRA inside of a frozen LoRA: the outer one holds the r greatest singular directions of W, the inner one starts from
their `inner` greatest singular values, and B_0 A_0 = diag(S_inner, 0) is taken off W. The singular vectors come from a
randomised range finder with the site's seed, where the paper has an SVD, which takes minutes on a wide model.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.linalg import top_singular_fast


@config
class NoraConfig(DeltaConfig):
    method: Literal["nora"] = "nora"
    r: PositiveCount = 64
    """The outer rank. A layer with fewer rows or columns than this takes all its singular values."""
    inner: PositiveCount = 16
    """The inner rank."""


class Nora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Lin et al. 2024, arXiv:2408.10280"
    formula = "2 * min(r, d_in, d_out) * min(inner, r, d_in, d_out)"
    learning_rate = 2e-3
    kinds = ("linear", "embedding")
    A_outer: Tensor
    B_outer: Tensor
    S: Tensor

    def __init__(self, site: Site, config: NoraConfig) -> None:
        super().__init__(site, config)
        r = min(config.r, site.d_in, site.d_out)
        inner = min(config.inner, r)
        self.register_buffer("A_outer", torch.zeros(r, site.d_in))
        self.register_buffer("B_outer", torch.zeros(site.d_out, r))
        self.register_buffer("S", torch.zeros(r))  # what the inner one starts from: zero after the first `inner`
        self.A_inner = nn.Parameter(torch.zeros(inner, r))
        self.B_inner = nn.Parameter(torch.zeros(r, inner))

    def start(self) -> None:
        r, inner = self.B_inner.shape
        U, S, Vh = top_singular_fast(self.site.W(), r, self.site.generator())
        self.A_outer.copy_(Vh)
        self.B_outer.copy_(U)
        self.S[:inner] = S[:inner]
        self.A_inner.copy_(S.sqrt().diag()[:inner])
        self.B_inner.copy_(S.sqrt().diag()[:, :inner])

    def factors(self) -> tuple[Tensor, Tensor]:
        core = self.B_inner @ self.A_inner - self.S.diag()
        return self.A_outer, self.B_outer @ core
