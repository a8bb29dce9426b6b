"""OFT: Orthogonal Finetuning. Qiu et al. 2023, arXiv:2306.07280, section 3.3; applied to x as in section 3.2 of OFTv2:
Qiu et al. 2025, arXiv:2506.19847.

    h = W R^T x + b        R = diag(R_1 .. R_n), orthogonal        R_i = (I + Q_i) (I - Q_i)^-1, b x b

Q_i = -Q_i^T is kept as the b (b - 1) / 2 numbers above its diagonal, at first 0, so that R = I. PEFT keeps -Q_i with
the exact inverse and Q_i with the series; so do we. (The paper multiplies from the left because its W is our W^T.)

    R_i = (I + Q_i) (I + Q_i + Q_i^2 + Q_i^3)        Cayley-Neumann, section 3.3 of OFTv2: orthogonal up to O(Q^4)

x R costs d_in b a token, where R W^T would cost as much as the layer itself. b is the divisor of d_in that is nearest
to `block`. Left out: the constraint on the size of Q (COFT) and the scale of each output (section 3.5).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Count, Flag, PositiveCount, config
from graftlm.deltas.base import AroundDelta, DeltaConfig, PeftLayout, Site, once


@config
class OftConfig(DeltaConfig):
    method: Literal["oft"] = "oft"
    block: PositiveCount = 32
    """Width b of a block."""
    blocks: Count = 0
    """Their number (the r of the first paper), if it is not to follow from `block`."""
    block_share: Flag = False
    """One block for all of a site's."""
    neumann: Flag = False
    """The Cayley-Neumann series (PEFT's default) in place of the exact inverse."""


class Oft(AroundDelta):
    family = "reparameterisation"
    paper = "Qiu et al. 2023, arXiv:2306.07280"
    formula = "(1 if block_share else d_in // b) * b * (b - 1) // 2"
    peft = PeftLayout(
        type="OFT",
        tensors={"Q": "oft_R.weight"},
        fields={"block_share": "block_share", "neumann": "use_cayley_neumann"},
        defaults={"use_cayley_neumann": True},
        constants={"bias": "none", "coft": False, "num_cayley_neumann_terms": 5},
        harmless=("eps", "module_dropout"),
        # PEFT wants exactly one of the two not to be 0.
        facts=lambda site, config: {"oft_block_size": 0 if config.blocks else config.block, "r": config.blocks},
        translate=lambda stored: {"block": stored.get("oft_block_size") or 32, "blocks": stored.get("r") or 0},
    )
    above: Tensor

    def __init__(self, site: Site, config: OftConfig) -> None:
        super().__init__(site, config)
        size = config.blocks or config.block
        whole = [d for d in range(1, site.d_in + 1) if site.d_in % d == 0]
        nearest = min(whole, key=lambda d: (abs(d - size), d))
        self.b = site.d_in // nearest if config.blocks else nearest
        self.Q = nn.Parameter(torch.zeros(1 if config.block_share else site.d_in // self.b, self.b * (self.b - 1) // 2))
        self.register_buffer("above", torch.triu_indices(self.b, self.b, 1), persistent=False)
        self.neumann = config.neumann

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _turn(W, self._turning().mT), b

    def input(self, x: Tensor) -> Tensor:
        return _turn(x, self._turning())

    @once
    def _turning(self) -> Tensor:
        """R_i - I, [n, b, b]: what is added to x keeps its digits where products run in half precision."""
        half = self.Q.new_zeros(len(self.Q), self.b, self.b)
        half[:, self.above[0], self.above[1]] = self.Q
        Q, I = half - half.mT, self.Q.new_ones(self.b).diag()  # noqa: E741
        if self.neumann:
            return Q @ (2 * I + Q @ (2 * I + Q @ (2 * I + Q)))
        exact: Tensor = torch.linalg.solve(I + Q, -2 * Q)
        return exact


def _turn(x: Tensor, D: Tensor) -> Tensor:
    """x (I + diag(D_1 .. D_n)) for x [.. n b]."""
    parts = x.unflatten(-1, (-1, D.shape[-1]))
    return x + torch.einsum("...nk,nkc->...nc", parts, D.expand(parts.shape[-2], -1, -1)).flatten(-2)
