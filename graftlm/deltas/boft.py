"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. Liu et al. 2023, arXiv:2311.06243,
section 4.

    h = diag(s) W R^T x + b        R = B_m .. B_2 B_1        s [d_out], at first 1; BOFT(m, b) of the paper

    B_i  orthogonal: d_in / b blocks of b x b, each over two runs of b / 2 elements that lie 2^(i-1) runs apart
    each block is (I + Q) (I - Q)^-1 with Q = (P^T - P) / 2, P [b, b] learnt, at first 0 so that R = I

m = 1 is OFT. s is not in this paper but in its authors' code (PEFT's), after section 3.5 of OFT, arXiv:2306.07280.
The butterfly acts on x, as products with small blocks, at d_in b m a token; no matrix of W's size is built.

PEFT computes m = 1, whatever its config says, where it cannot compile its CUDA kernel: there it refuses adapters with
m > 1 for their shapes.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AroundDelta, Base, DeltaConfig, PeftLayout, Site, once
from graftlm.errors import TargetError

FAR = 64
"""Up to here one product with larger blocks is faster than m products with small ones."""


@config
class BoftConfig(DeltaConfig):
    method: Literal["boft"] = "boft"
    block: PositiveCount = 8
    """Width b of a block; even, unless there is one factor."""
    factors: PositiveCount = 2
    """Number m of butterfly factors; b 2^(m - 1) must divide d_in."""


class Boft(AroundDelta):
    family = "reparameterisation"
    paper = "Liu et al. 2023, arXiv:2311.06243"
    formula = "factors * d_in * block + d_out"
    peft = PeftLayout(
        type="BOFT",
        tensors={"P": "boft_R", "s": "boft_s"},
        fields={"block": "boft_block_size", "factors": "boft_n_butterfly_factor"},
        defaults={"boft_block_size": 4, "boft_n_butterfly_factor": 1},
        constants={"bias": "none", "boft_block_num": 0},
        harmless=("boft_dropout",),
    )

    def __init__(self, site: Site, config: BoftConfig) -> None:
        super().__init__(site, config)
        b, m = config.block, config.factors
        if site.d_in % (b * 2 ** (m - 1)) or (m > 1 and b % 2):
            raise TargetError(
                f"boft: {m} factors with blocks of {b} want an even block and an input that {b * 2 ** (m - 1)} "
                f"divides; {site.name} has {site.d_in}: choose another block or fewer factors",
                code="indivisible-layer",
            )
        self.P = nn.Parameter(torch.zeros(m, site.d_in // b, b, b))
        self.s = nn.Parameter(torch.ones(site.d_out, 1))

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for step, D in enumerate(self._turnings().mT):
            W = _turn(W, D, step)
        return self.s * W, b

    def input(self, x: Tensor) -> Tensor:
        return _turn_all(x, self._turnings()) if self._reach > FAR else _turn(x, self._whole_turning(), 0)

    def output(self, z: Tensor, x: Tensor, base: Base) -> Tensor:
        s, b = self.s[:, 0], base.bias
        return z * s if b is None else z * s + (1 - s) * b

    @property
    def _reach(self) -> int:
        """R mixes nothing beyond runs of so many elements."""
        return self.P.shape[-1] << len(self.P) - 1

    @once
    def _whole_turning(self) -> Tensor:
        """All steps as one, found by turning the identity: R - I, [d_in / reach, reach, reach]."""
        I = self.s.new_ones(self._reach).diag()  # noqa: E741
        R = _turn_all(I.repeat(1, self.site.d_in // self._reach), self._turnings())
        turning: Tensor = R.unflatten(1, (-1, self._reach)).transpose(0, 1) - I
        return turning

    @once
    def _turnings(self) -> Tensor:
        """Each block less I, [m, d_in / b, b, b]: what is added to x keeps its digits in half precision."""
        Q, I = (self.P.mT - self.P) / 2, self.P.new_ones(self.P.shape[-1]).diag()  # noqa: E741
        turnings: Tensor = torch.linalg.solve(I - Q, 2 * Q)
        return turnings


def _turn_all(x: Tensor, turnings: Tensor) -> Tensor:
    """x R."""
    for step in reversed(range(len(turnings))):
        x = _turn(x, turnings[step], step)
    return x


def _turn(x: Tensor, D: Tensor, step: int) -> Tensor:
    """x (I + B) for the butterfly factor B with the blocks D [n, b, b], its pairs of runs 2^step runs apart."""
    n, b, _ = D.shape
    if step == 0:
        return x + torch.einsum("...nk,nkc->...nc", x.unflatten(-1, (n, b)), D).flatten(-2)
    apart, run = 2**step, b // 2
    pairs = x.unflatten(-1, (n // apart, 2, apart, run))
    blocks = D.view(n // apart, apart, 2, run, 2, run)
    return x + torch.einsum("...npjk,njpkqc->...nqjc", pairs, blocks).flatten(-4)
