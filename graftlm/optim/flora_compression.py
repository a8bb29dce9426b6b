"""Flora: a momentum in random directions that change (Hao, Cao and Mou 2024, arXiv:2402.03293, algorithm 2).

    U = (1 - b) N + b A^T C        N [n, m] the gradient as Adafactor scales it, n <= m (turned where it is taller)
    C <- A' A^T C                  where A' is drawn in place of A: every `every` steps; A = A' from then on
    C <- b C + (1 - b) A N         C [r, m] the momentum, A [r, n] of N(0, 1 / r), so that A^T A is I in the mean
    W <- W - eta U / max(1, rms(U))

LoRA with a frozen A is, to first order, such a compression of the gradient; other directions every so often make the
sum of its steps of full rank. (The method `flora` is something else that has the same name.)

N = G / sqrt(R C^T / mean(R)) with running means of the squares over rows and over columns, as the authors' optimizer
has it (Adafactor, beta2 = 1 - t^-0.8). A is never kept: it is drawn again at each step from the seed, the tensor's name
and the number of the period. Vectors and matrices with a side of at most r have a momentum of their full size.

Departure: rates are not multiplied by the size of W, which a delta that starts at zero does not have.
"""

from collections.abc import Sequence
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, Share, config
from graftlm.training.callback import Optimizer, OptimizerConfig, is_over, needs_matrices_over, torch_groups
from graftlm.training.state import ParameterGroup, TrainingState

FLOOR = 1e-30


@config
class FloraCompressionConfig(OptimizerConfig):
    name: Literal["flora-compression"] = "flora-compression"
    rank: PositiveCount = 128
    """Directions that are kept of each matrix; one with a side of no more keeps moments of its full size."""
    every: PositiveCount = 1000
    """Steps with the same directions."""
    momentum: Share = 0.9
    """The share of the last steps in each."""


class FloraOptimizer(torch.optim.Optimizer):
    seed = 0

    def __init__(self, config: FloraCompressionConfig, groups: Sequence[ParameterGroup], weight_decay: float) -> None:
        super().__init__(torch_groups(groups), {"weight_decay": weight_decay})
        self.config: FloraCompressionConfig = config
        self.names = {p: name for group in groups for name, p in group.parameters.items()}

    def directions(self, name: str, period: int, n: int) -> Tensor:
        """A [r, n] of a tensor in a period."""
        generator = torch.Generator().manual_seed(crc32(f"{self.seed}/{name}/{period}".encode()))
        return torch.randn(self.config.rank, n, generator=generator).div(self.config.rank**0.5)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        b = self.config.momentum
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, turned = self.state[p], p.dim() == 2 and p.shape[0] > p.shape[1]
                N = self._scaled(p.grad.T if turned else p.grad, state)
                if is_over(self.config.rank, p):
                    old, new = ((state["step"] - back) // self.config.every for back in (2, 1))
                    A = self.directions(self.names[p], max(0, old), len(N)).to(N)
                    C = state.setdefault("C", N.new_zeros(len(A), N.shape[1]))
                    U = (1 - b) * N + b * (A.T @ C)
                    if new > old >= 0:
                        A, before = self.directions(self.names[p], new, len(N)).to(N), A
                        C.copy_(A @ (before.T @ C))
                    C.mul_(b).add_(A @ N, alpha=1 - b)
                else:
                    M = state.setdefault("M", torch.zeros_like(N))
                    U = M.mul_(b).add_(N, alpha=1 - b)
                U = U / U.square().mean().sqrt().clamp(min=1.0)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(U.T if turned else U, alpha=group["lr"])

    def _scaled(self, G: Tensor, state: dict[str, Tensor | int]) -> Tensor:
        t = state["step"] = int(state.get("step", 0)) + 1
        b2, squares = 1 - t**-0.8, G.square().add_(FLOOR)
        means = [squares.mean(1), squares.mean(0)] if G.dim() == 2 else [squares]
        moments = []
        for i, mean in enumerate(means):
            side = state.setdefault(f"side {i}", torch.zeros_like(mean))
            assert isinstance(side, Tensor)
            moments.append(side.mul_(b2).add_(mean, alpha=1 - b2))
        if len(moments) == 1:
            return G * moments[0].rsqrt()
        return G * (moments[0] / moments[0].mean()).rsqrt()[:, None] * moments[1].rsqrt()


class FloraCompression(Optimizer):
    paper = "Hao, Cao and Mou 2024, arXiv:2402.03293"
    cost = "one moment of r rows in place of two of all; its directions are drawn again at every step"

    def refusal(self, training: TrainingState) -> str:
        return needs_matrices_over(self.config.rank, training)

    def state_bytes(self, parameter: nn.Parameter) -> int:
        sides = sum(parameter.shape) if parameter.dim() == 2 else parameter.numel()
        compressed = is_over(self.config.rank, parameter)
        return 4 * (sides + (self.config.rank * max(parameter.shape) if compressed else parameter.numel()))

    def make(self, groups: Sequence[ParameterGroup], *, weight_decay: float) -> torch.optim.Optimizer:
        return FloraOptimizer(self.config, groups, weight_decay)

    def on_start(self, training: TrainingState) -> None:
        assert isinstance(training.optimizer, FloraOptimizer)
        training.optimizer.seed = training.seed
