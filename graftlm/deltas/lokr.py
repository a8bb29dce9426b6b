"""LoKr: Low-rank adaptation with Kronecker product. Yeh et al. 2023, arXiv:2309.14859, equations 4 and 5; the product
was first used so in KronA: Edalati et al. 2022, arXiv:2212.10650.

    dW = s C (x) W2    C [u_out, u_in]    W2 [v_out, v_in], whole or B A with B [v_out, r], A [r, v_in]    s = alpha / r

d = u v for both sides; u is the largest divisor of d up to min(f, sqrt(d)), and f itself wherever f divides d (as the
authors' code and PEFT have it). W2 is whole where r is at least half its longer side, and with r = 0, as in the paper's
experiments, with s = 1. C is B A too with `decompose_both`, where r is less than half its longer side.

dW is not built to train it: with x as a matrix X [u_in, v_in], dW x is s C X W2^T.

The start is that of the authors' code: W2 (or its A) at zero, the others from U(-1/sqrt(n), 1/sqrt(n)) for n columns.
PEFT's default start has C at zero instead.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Count, Flag, PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, Base, DeltaConfig, PeftLayout, Site

WHOLE = 2**20
"""A rank at which PEFT keeps both parts whole."""


@config
class LokrConfig(DeltaConfig):
    method: Literal["lokr"] = "lokr"
    r: Count = 0
    alpha: PositiveRate = 16
    factor: PositiveCount | Literal[-1] = 8
    """f; -1 for no bound but the square root."""
    decompose_both: Flag = False


class Lokr(AdditiveDelta):
    family = "reparameterisation"
    paper = "Yeh et al. 2023, arXiv:2309.14859"
    formula = "(r * (u_out + u_in) if left else u_out * u_in) + (r * (v_out + v_in) if right else v_out * v_in)"
    learning_rate = 2e-3
    peft = PeftLayout(
        type="LOKR",
        tensors={"C": "lokr_w1", "C_B": "lokr_w1_a", "C_A": "lokr_w1_b"}
        | {"W2": "lokr_w2", "W2_B": "lokr_w2_a", "W2_A": "lokr_w2_b"},
        fields={"r": "r", "alpha": "alpha", "factor": "decompose_factor", "decompose_both": "decompose_both"},
        defaults={"r": 8, "alpha": 8, "decompose_factor": -1},
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
        harmless=("module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d"),
        facts=lambda site, config: {} if config.r else {"r": WHOLE, "alpha": WHOLE},
        why_not=lambda config: (
            "PEFT has no rank 0, and no pattern for it"
            if any(there.get("r", 1) == 0 for there in config.patterns.values()) or (config.patterns and not config.r)
            else ""
        ),
    )

    def __init__(self, site: Site, config: LokrConfig) -> None:
        super().__init__(site, config)
        r, draw = config.r, site.generator()
        self.u_in, self.u_out = _left(site.d_in, config.factor), _left(site.d_out, config.factor)
        self.v_in, self.v_out = site.d_in // self.u_in, site.d_out // self.u_out
        self.left = config.decompose_both and 0 < r < max(self.u_in, self.u_out) / 2
        self.right = 0 < r < max(self.v_in, self.v_out) / 2
        self.scale = config.alpha / r if r else 1.0

        def uniform(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(rows, columns, generator=draw) - 1) / columns**0.5)

        if self.left:
            self.C_B, self.C_A = uniform(self.u_out, r), uniform(r, self.u_in)
        else:
            self.C = uniform(self.u_out, self.u_in)
        if self.right:
            self.W2_B, self.W2_A = uniform(self.v_out, r), nn.Parameter(torch.zeros(r, self.v_in))
        else:
            self.W2 = nn.Parameter(torch.zeros(self.v_out, self.v_in))

    def matrix(self) -> Tensor:
        return self.scale * torch.kron(self._C(), self.W2_B @ self.W2_A if self.right else self.W2)

    def increment(self, x: Tensor, base: Base) -> Tensor:
        X: Tensor = x.unflatten(-1, (self.u_in, self.v_in))
        X = X @ (self.W2_A if self.right else self.W2).T
        X = torch.einsum("iu,...uk->...ik", self.scale * self._C(), X)
        return (X @ self.W2_B.T if self.right else X).flatten(-2)

    def _C(self) -> Tensor:
        return self.C_B @ self.C_A if self.left else self.C


def _left(d: int, factor: int) -> int:
    """u: the part of d that goes to C."""
    if factor > 0 and d % factor == 0:
        return factor
    return max(u for u in range(1, int(d**0.5) + 1) if d % u == 0 and (u <= factor or factor < 0))
