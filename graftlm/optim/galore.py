"""GaLore: Adam on gradients that are projected to a few directions (Zhao et al. 2024, arXiv:2403.03507, algorithm 1).

    R = P^T G                       G [n, m] gradient, n <= m;  P [n, r] the first r left singular vectors of G
    M <- b1 M + (1 - b1) R          V <- b2 V + (1 - b2) R^2    moments [r, m] in place of [n, m]
    W <- W - eta alpha P (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)

    r  `rank`     alpha  `scale`     P is taken anew from the gradient at hand every `every` steps

Where n > m the other side is projected, by right singular vectors. The moments stay as they are when P changes, as the
paper has it. Vectors and matrices with a side of at most r keep Adam as it is.

Departures: embeddings are projected too (theirs are the largest moments here; the authors leave them out). A gradient
that is all zero, as LoRA's A has at first, gives no P: that matrix waits for its first other one. The sign of a
singular vector is arbitrary: each column of a new P has the sign with which it is nearer to the column that it
replaces, so that the moments go on fitting and what is learnt does not depend on the linear algebra library. Where the
recipe gives no learning rate, the method's is divided by alpha: projected matrices then have the method's rate.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.training.callback import Optimizer, OptimizerConfig, is_over, needs_matrices_over, torch_groups
from graftlm.training.state import ParameterGroup, TrainingState


@config
class GaloreConfig(OptimizerConfig):
    name: Literal["galore"] = "galore"
    rank: PositiveCount = 128
    """Directions that are kept of each matrix; one with a side of no more keeps moments of its full size."""
    every: PositiveCount = 200
    """Steps between two projections."""
    scale: PositiveRate = 0.25
    """Factor on the learning rate of matrices that are projected."""


class ProjectedAdam(torch.optim.Optimizer):
    """AdamW whose moments are of P^T G for matrices with both sides over `rank`."""

    def __init__(self, settings: "Projecting", groups: Sequence[ParameterGroup], weight_decay: float) -> None:
        super().__init__(torch_groups(groups), {"weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8})
        self.settings = settings

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (b1, b2), eps = group["betas"], group["eps"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, G = self.state[p], p.grad
                projected = is_over(self.settings.config.rank, p)
                if projected and "P" not in state and not G.any():
                    continue
                turned = projected and p.shape[0] > p.shape[1]
                G = G.T if turned else G
                if projected:
                    before = state.get("P")
                    self.settings.renew(state, G)
                    if before is not None and state["P"] is not before:
                        state["P"] = with_signs_of(before, state["P"])
                R = state["P"].T @ G if projected else G
                M = state.setdefault("M", torch.zeros_like(R))
                V = state.setdefault("V", torch.zeros_like(R))
                t = state["step"] = state.get("step", 0) + 1
                M.mul_(b1).add_(R, alpha=1 - b1)
                V.mul_(b2).addcmul_(R, R, value=1 - b2)
                N = (M / (1 - b1**t)) / ((V / (1 - b2**t)).sqrt() + eps)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if projected:  # in the memory of p
                    (p.T if turned else p).addmm_(state["P"], N, alpha=-group["lr"] * self.settings.config.scale)
                else:
                    p.sub_(N, alpha=group["lr"])


class Projecting(Optimizer):
    """What differs between the ways to choose P."""

    @abstractmethod
    def renew(self, state: dict[str, Any], G: Tensor) -> None:
        """Set state["P"] [n, r] before step state["step"] + 1, if it is due; G [n, m], n <= m, is not all zero."""

    def refusal(self, training: TrainingState) -> str:
        return needs_matrices_over(self.config.rank, training)

    def default_rate(self, rate: float) -> float:
        return rate / float(self.config.scale)

    def state_bytes(self, parameter: nn.Parameter) -> int:
        if not is_over(self.config.rank, parameter):
            return 8 * parameter.numel()
        r: int = self.config.rank
        return 4 * r * (2 * max(parameter.shape) + min(parameter.shape))  # M, V and P

    def make(self, groups: Sequence[ParameterGroup], *, weight_decay: float) -> torch.optim.Optimizer:
        return ProjectedAdam(self, groups, weight_decay)


class Galore(Projecting):
    paper = "Zhao et al. 2024, arXiv:2403.03507"
    cost = "moments of r rows in place of all; the singular vectors of every gradient each `every` steps"

    def renew(self, state: dict[str, Any], G: Tensor) -> None:
        if "P" not in state or state["step"] % self.config.every == 0:
            state["P"] = leading(G, self.config.rank)


def with_signs_of(before: Tensor, P: Tensor) -> Tensor:
    """P [n, r] with each column's sign such that its product with the same column of `before` is not negative."""
    return P * torch.where((before * P).sum(0) < 0, -1.0, 1.0)


def leading(G: Tensor, r: int) -> Tensor:
    """The first r left singular vectors of G [n, m], n <= m, as [n, r].

    They are the eigenvectors of G G^T, in float64 because that squares what singular values are apart by, and summed in
    parts: a fraction of the time and memory of a singular value decomposition where m is a vocabulary.
    """
    products = torch.zeros(len(G), len(G), dtype=torch.float64, device=G.device)
    for part in G.split(4096, dim=1):
        products += part.double() @ part.double().T
    vectors: Tensor = torch.linalg.eigh(products).eigenvectors
    return vectors[:, -r:].flip(1).to(G.dtype).contiguous()
