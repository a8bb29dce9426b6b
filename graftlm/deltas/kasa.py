"""KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models. Wang et al. 2024, arXiv:2412.06071.

    h = (W - N) x + s U diag(sigma) V x        U [d_out, r]  sigma [r]  V [r, d_in]  s = alpha / r
    N = the sum of the smallest singular components of W, which count as noise: N = N_B N_A, frozen
    loss + sum over sites (beta ||sigma||^2 + gamma (||U^T U - I|| + ||V V^T - I||))        Frobenius norms

N is taken out for good, so the fresh delta is not the identity: with an offset that gave N back, nothing would be left
of the truncation. The base is never edited: -N is a part of dW, kept with the adapter. U starts at zero, sigma at
N(0, 1) and V as LoRA's A, as in the authors' code.

How much is cut off: W keeps its first d_in - r components, as in the authors' code. So a square or tall layer loses r
of them, and a layer with d_out <= d_in - r loses none. The text, and PEFT, cut r components of every layer; the
authors' own tasks adapt square layers, where both are the same. In SmolLM2 the last components of v_proj (192 x 576)
are no noise: without r of them the loss of a text is 6.8 nats, with all of them 1.9.

The code differs from the paper in its penalty: it takes U U^T and V^T V (d x d) and divides by the number of layers.
The paper is followed. PEFT (`kasa_config`) computes the same function, but edits its base and stores no N: its file
has no place for what makes ours independent of a second SVD, so that the folder is in our own format.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, Rate, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.errors import TargetError


@config
class KasaConfig(DeltaConfig):
    method: Literal["kasa"] = "kasa"
    r: PositiveCount = 8
    alpha: PositiveRate = 16
    beta: Rate = 1e-4
    """Weight of the squared singular values in the loss."""
    gamma: Rate = 1e-3
    """Weight of the distance of U and V from orthogonality in the loss."""


class Kasa(AdditiveDelta):
    family = "reparameterisation"
    paper = "Wang et al. 2024, arXiv:2412.06071"
    formula = "r * (d_in + d_out + 1)"
    learning_rate = 2e-3
    starts_away = "the paper removes the smallest singular components of W, for good"
    N_A: Tensor
    N_B: Tensor

    def __init__(self, site: Site, config: KasaConfig) -> None:
        super().__init__(site, config)
        r, d_in, d_out = config.r, site.d_in, site.d_out
        cut = max(0, min(d_in, d_out) - max(0, d_in - r))
        if cut == min(d_in, d_out):
            raise TargetError(
                f"kasa: with r = {r} nothing is left of the {d_out} x {d_in} weight of {site.name}",
                code="rank-too-large",
            )
        generator = site.generator()
        self.V = nn.Parameter((2 * torch.rand(r, d_in, generator=generator) - 1) / d_in**0.5)
        self.sigma = nn.Parameter(torch.randn(r, generator=generator))
        self.U = nn.Parameter(torch.zeros(d_out, r))
        self.register_buffer("N_A", torch.zeros(cut, d_in))
        self.register_buffer("N_B", torch.zeros(d_out, cut))
        self.cut, self.beta, self.gamma = cut, config.beta, config.gamma
        self.scale = config.alpha / r

    def start(self) -> None:
        if self.cut:
            U, S, Vh = torch.linalg.svd(self.site.W(), full_matrices=False)
            self.N_A.copy_(Vh[-self.cut :])
            self.N_B.copy_(U[:, -self.cut :] * S[-self.cut :])

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.V, self.N_A]), torch.cat([self.scale * self.sigma * self.U, -self.N_B], dim=1)

    def penalty(self) -> Tensor:
        one = torch.ones_like(self.sigma).diag()
        uneven = (self.U.T @ self.U - one).norm() + (self.V @ self.V.T - one).norm()
        total: Tensor = self.beta * self.sigma.square().sum() + self.gamma * uneven
        return total
