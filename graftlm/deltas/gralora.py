"""GraLoRA: Granular Low-Rank Adaptation. Jung et al. 2025, arXiv:2505.20355.

    dW_ij = s B_ij A_ij        block (i, j) of k x k blocks: rows i of the outputs, columns j of the inputs
                               A_ij [r / k, d_in / k]  B_ij [d_out / k, r / k]        s = alpha / (r + hybrid_r)
    dW = (dW_ij) + s D C       C [hybrid_r, d_in]  D [d_out, hybrid_r]: a LoRA across the blocks, if hybrid_r is not 0

A block of its own for each pair of slices keeps an outlier of x out of the gradients of the other slices. dW has the
parameters of a LoRA of rank r, and up to k times its rank. k must divide r and the sizes of every layer.

A and C start as LoRA's A, B and D at zero. As in PEFT and the authors' code A is [k, d_in / k, r], by j, with the
columns of all i, and B [k, r, d_out / k], by i, with the rows of all j. The authors count hybrid_r as a part of r;
here, as in PEFT, it comes on top.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Count, PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, Base, DeltaConfig, PeftLayout, Site, check_divides
from graftlm.deltas.starts import uniform_A


@config
class GraloraConfig(DeltaConfig):
    method: Literal["gralora"] = "gralora"
    r: PositiveCount = 32
    """Shared by the k blocks of a row: a multiple of k."""
    alpha: PositiveRate = 64
    k: PositiveCount = 2
    """Blocks in each direction. The authors: 2 for r up to 32, 4 from 64 on."""
    hybrid_r: Count = 0

    def __post_init__(self) -> None:
        if self.r % self.k:
            raise ValueError(f"r is {self.r}, which {self.k} blocks cannot share equally: make it a multiple of k")


class Gralora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Jung et al. 2025, arXiv:2505.20355"
    formula = "(r + hybrid_r) * (d_in + d_out)"
    learning_rate = 2e-3
    peft = PeftLayout(
        type="GRALORA",
        tensors={
            "A": "gralora_A",
            "B": "gralora_B",
            "C": "gralora_A_general.weight",
            "D": "gralora_B_general.weight",
        },
        fields={"r": "r", "alpha": "alpha", "k": "gralora_k", "hybrid_r": "hybrid_r", "dropout": "gralora_dropout"},
        constants={"bias": "none"},
    )

    def __init__(self, site: Site, config: GraloraConfig) -> None:
        super().__init__(site, config)
        r, self.k = config.r, config.k
        check_divides(self.k, "gralora: k", site)
        draw = site.generator()
        A = 2 * torch.rand(self.k, site.d_in // self.k, r, generator=draw) - 1
        self.A = nn.Parameter(A / (site.d_in // self.k) ** 0.5)
        self.B = nn.Parameter(torch.zeros(self.k, r, site.d_out // self.k))
        self.C = nn.Parameter(uniform_A(site, config.hybrid_r, draw)) if config.hybrid_r else None
        self.D = nn.Parameter(torch.zeros(site.d_out, config.hybrid_r)) if config.hybrid_r else None
        self.scale = config.alpha / (r + config.hybrid_r)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of rank k r + hybrid_r: row (j, i, .) of A reads slice j of x, and column (j, i, .) of B writes slice i."""
        A, B = torch.block_diag(*self.A.mT), torch.block_diag(*self.B.mT)
        B = B.unflatten(1, (self.k, self.k, -1)).transpose(1, 2).flatten(1)  # from (i, j, .) to (j, i, .)
        if self.C is not None and self.D is not None:
            A, B = torch.cat([A, self.C]), torch.cat([B, self.D], dim=1)
        return A, self.scale * B

    def increment(self, x: Tensor, base: Base) -> Tensor:
        """Without the zeros of the block-diagonal matrices: k times fewer products."""
        slices = x.reshape(-1, self.k, self.A.shape[1]).transpose(0, 1)  # [j, T, d_in / k]
        low_rank = (slices @ self.A).unflatten(2, (self.k, -1)).permute(2, 1, 0, 3).flatten(2)  # [i, T, r]
        y: Tensor = (low_rank @ (self.scale * self.B)).transpose(0, 1).flatten(1).unflatten(0, x.shape[:-1])
        if self.C is None or self.D is None:
            return y
        return y + base.take(x, self.C) @ (self.scale * self.D).T
