"""SM3: one number for each row and column in place of a second moment (Anil et al. 2019, arXiv:1901.11150, SM3-II).

    N_ij = min(r_i, c_j) + G_ij^2        r_i <- max_j N_ij        c_j <- max_i N_ij
    M <- b M + (1 - b) G / sqrt(N)       W <- W - eta M

    G [n, m] gradient; r [n], c [m], at first 0; M [n, m] with b = `momentum`, left out where that is 0

Adagrad's accumulator from above: N is at least the sum of squares so far, so rates fall and never rise. Vectors have
that sum itself. Where G and N are 0 the step is 0. Where the recipe gives no learning rate, eta is RATE times the
method's, which was found with AdamW: N sums up where Adam has a mean, so steps here are smaller from the second on.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import nn

from graftlm.config.schema import Share, config
from graftlm.training.callback import Optimizer, OptimizerConfig, torch_groups
from graftlm.training.state import ParameterGroup

RATE = 4.0
"""8 steps of 4 rows of docstrings on SmolLM2, LoRA: the held-out loss falls by 0.87 nats, with AdamW by 0.54."""


@config
class Sm3Config(OptimizerConfig):
    name: Literal["sm3"] = "sm3"
    momentum: Share = 0.9
    """0 keeps a row and a column of each matrix and nothing else."""


class Sm3Optimizer(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                G, state = p.grad if p.dim() else p.grad[None], self.state[p]
                sides = [state.setdefault(f"side {i}", G.new_zeros(n)) for i, n in enumerate(G.shape)]
                views = [s.view([-1 if j == i else 1 for j in range(G.dim())]) for i, s in enumerate(sides)]
                N = reduce(torch.minimum, views) + G.square()
                for i, side in enumerate(sides):
                    others = [j for j in range(G.dim()) if j != i]
                    side.copy_(N.amax(others) if others else N)
                step = torch.where(N > 0, G * N.rsqrt(), 0.0)
                if group["momentum"]:
                    M = state.setdefault("M", torch.zeros_like(G))
                    step = M.mul_(group["momentum"]).add_(step, alpha=1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step.view_as(p), alpha=group["lr"])


class Sm3(Optimizer):
    paper = "Anil et al. 2019, arXiv:1901.11150"
    cost = "one moment in place of two, or none with `momentum: 0`"

    def default_rate(self, rate: float) -> float:
        return RATE * rate

    def state_bytes(self, parameter: nn.Parameter) -> int:
        return 4 * (sum(parameter.shape) + (parameter.numel() if self.config.momentum else 0))

    def make(self, groups: Sequence[ParameterGroup], *, weight_decay: float) -> torch.optim.Optimizer:
        return Sm3Optimizer(torch_groups(groups), {"weight_decay": weight_decay, "momentum": self.config.momentum})
