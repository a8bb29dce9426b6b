"""GLoRA: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning. Chavan et al. 2023, arXiv:2306.07967.

    W' = W + W * A + B            A, B [d_out, d_in]: low-rank, a column (vector), a number (scalar) or none
    b' = b + D * b + E + W C      C [d_in]: low-rank, vector or none;  D, E [d_out]: vector, scalar or none

All start at zero: low-rank is left @ right with left [.., r] zero and right [r, ..] Xavier-uniform, as in the authors'
code. Where the base has no bias, b is zero, E + W C become one and D is left out. The paper picks the forms of each
layer by an evolutionary search over one net that holds them all; here they are fields, and `patterns` sets them by
layer. Nothing stands in front of B.

PEFT's GLORA ties the forms of A and B and of D and E, gives layers without a bias no E and C, and stores zeros for what
is left out. The paper is followed, so that the folder is in our own format.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import Base, DeltaConfig, Site, WeightDelta


@config
class GloraConfig(DeltaConfig):
    method: Literal["glora"] = "glora"
    r: PositiveCount = 8
    A: Literal["low-rank", "vector", "scalar", "none"] = "low-rank"
    B: Literal["low-rank", "vector", "scalar", "none"] = "low-rank"
    C: Literal["low-rank", "vector", "none"] = "vector"
    D: Literal["vector", "scalar", "none"] = "vector"
    E: Literal["vector", "scalar", "none"] = "vector"


class Support(nn.Module):
    """One of A .. E: [rows, columns], or what is broadcast to it."""

    def __init__(self, form: str, rows: int, columns: int, r: int, generator: torch.Generator) -> None:
        super().__init__()
        low = form == "low-rank"
        self.left = nn.Parameter(torch.zeros(1 if form == "scalar" else rows, r if low else 1))
        right = (2 * torch.rand(r, columns, generator=generator) - 1) * (6 / (r + columns)) ** 0.5
        self.right = nn.Parameter(right) if low else None

    def value(self) -> Tensor:
        return self.left if self.right is None else self.left @ self.right


class Glora(WeightDelta):
    family = "reparameterisation"
    paper = "Chavan et al. 2023, arXiv:2306.07967"
    formula = (
        "sum({'low-rank': r * (d_out + d_in), 'vector': d_out, 'scalar': 1, 'none': 0}[form] for form in (A, B)) "
        "+ {'low-rank': r * (d_in + 1), 'vector': d_in, 'none': 0}[C] "
        "+ sum({'vector': d_out, 'scalar': 1, 'none': 0}[form] for form in ((D, E) if has_bias else (E,)))"
    )

    def __init__(self, site: Site, config: GloraConfig) -> None:
        super().__init__(site, config)
        d_in, d_out, generator = site.d_in, site.d_out, site.generator()

        def support(form: str, rows: int, columns: int = 1) -> Support | None:
            return None if form == "none" else Support(form, rows, columns, config.r, generator)

        self.A, self.B = support(config.A, d_out, d_in), support(config.B, d_out, d_in)
        self.C, self.E = support(config.C, d_in), support(config.E, d_out)
        self.D = support(config.D, d_out) if site.has_bias else None

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        changed = W if self.A is None else W + W * self.A.value()
        if self.B is not None:
            changed = changed + self.B.value()
        return changed, self._bias(b, None if self.C is None else W @ self.C.value())

    def _bias(self, b: Tensor | None, W_C: Tensor | None) -> Tensor | None:
        """b' [d_out] from W C [d_out, 1]."""
        parts = [] if b is None else [b]
        if self.D is not None and b is not None:
            parts.append(self.D.value()[:, 0] * b)
        if self.E is not None:
            parts.append(self.E.value()[:, 0].expand(self.site.d_out))
        if W_C is not None:
            parts.append(W_C[:, 0])
        return torch.stack(parts).sum(0) if parts else None

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        if self.A is not None and self.A.right is not None:  # as cheap as it gets: r products with W cost more
            return base.apply(x, *self.effective(base.weight, base.bias))
        b, y = base.bias, base(x)
        if self.A is not None:
            y = y + self.A.left[:, 0] * (y if b is None else y - b)
        if self.B is not None:
            right = x.sum(-1, keepdim=True) if self.B.right is None else base.take(x, self.B.right)
            y = y + right @ self.B.left.T
        new = self._bias(b, None if self.C is None else base.product(self.C.value().T))
        return y if new is None else y + (new if b is None else new - b)
