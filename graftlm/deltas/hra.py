"""HRA: Householder Reflection Adaptation. Yuan et al. 2024, arXiv:2405.17484, section 3 and equation 6.

    h = W H_1 H_2 .. H_r x + b        H_i = I - 2 u_i u_i^T        u_i = column i of U [d_in, r], of length 1

    loss + lambda ||I - U^T U||^2     for each site: the planes of the reflections are kept apart

The chain is applied at once, in its compact form (Schreiber and Van Loan 1989), at the price of a LoRA of rank r:

    H_1 .. H_r = I - U T U^T          T^-1 = I / 2 + the part of U^T U above its diagonal

Columns start equal in pairs (as in PEFT; the paper names no start): each reflection undoes the one before; r is even.
Left out: the strictly orthogonal variant I - 2 U U^T (lambda = infinity, PEFT's apply_GS), which is never the identity.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, Rate, config
from graftlm.deltas.base import AroundDelta, DeltaConfig, PeftLayout, Site, once
from graftlm.errors import TargetError


@config
class HraConfig(DeltaConfig):
    method: Literal["hra"] = "hra"
    r: PositiveCount = 32
    orthogonality: Rate = 1e-4
    """The lambda of the paper."""


class Hra(AroundDelta):
    family = "reparameterisation"
    paper = "Yuan et al. 2024, arXiv:2405.17484"
    formula = "r * d_in"
    peft = PeftLayout(
        type="HRA",
        tensors={"U": "hra_u"},
        fields={"r": "r"},
        defaults={"r": 8},
        constants={"apply_GS": False, "bias": "none"},
    )

    def __init__(self, site: Site, config: HraConfig) -> None:
        super().__init__(site, config)
        half = 2 * torch.rand(site.d_in, (config.r + 1) // 2, generator=site.generator()) - 1
        self.U = nn.Parameter((half / half.shape[1] ** 0.5).repeat_interleave(2, dim=1)[:, : config.r].contiguous())
        self.orthogonality = config.orthogonality

    def start(self) -> None:
        if self.U.shape[1] % 2:
            raise TargetError(
                f"hra: r must be even, for reflections start in pairs that cancel; r is {self.U.shape[1]}",
                code="odd-rank",
            )

    def penalty(self) -> Tensor | None:
        if not self.orthogonality:
            return None
        U = self._columns()
        return self.orthogonality * (U.T @ U - U.new_ones(U.shape[1]).diag()).square().sum()

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        U, T = self._compact()
        return W - W @ U @ T @ U.T, b

    def input(self, x: Tensor) -> Tensor:
        A, B = self._factors()
        return x - F.linear(F.linear(x, A), B)

    def _columns(self) -> Tensor:
        lengths: Tensor = torch.linalg.vector_norm(self.U, dim=0)
        return self.U / lengths

    @once
    def _compact(self) -> tuple[Tensor, Tensor]:
        """(U, T) of the chain. T is computed in double, or pairs would not cancel where products run in half."""
        U = self._columns()
        V = U.double()
        I = V.new_ones(V.shape[1]).diag()  # noqa: E741
        return U, torch.linalg.solve_triangular((V.T @ V).triu(1) + I / 2, I, upper=True).to(U)

    @once
    def _factors(self) -> tuple[Tensor, Tensor]:
        """(T U^T, U) [r, d_in], [d_in, r]: x less their product is H x."""
        U, T = self._compact()
        return T @ U.T, U
