"""AdaLomo: LOMO with a learning rate for each element (Lv et al. 2023, arXiv:2310.10195, algorithm 1).

    r <- b r + (1 - b) mean over columns of g^2      c <- b c + (1 - b) mean over rows of g^2      b = 1 - t^-0.8
    u = g / sqrt(r c / mean(r))                      the second moment as a product of a column and a row
    u <- u / max(1, rms(u))                          grouped update normalisation, in place of clipping
    p <- p - eta max(1e-3, rms(W)) u

    g [n, m] gradient of p [n, m]; r [n], c [m]; for vectors r [n] alone, not averaged; t the number of the step
    eta  the recipe's learning rate, as a share of the size of what it changes: 5e-4 in the paper

It acts within the backward pass as LOMO does, and needs no pass for the norm: train.clip does nothing here.

rms(W) is of the weight that p changes where p has its shape (`full`: p is the change and starts at zero, which would
leave it at the floor of 1e-3), and of p itself elsewhere.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import config
from graftlm.optim.lomo import Fused
from graftlm.training.callback import OptimizerConfig
from graftlm.training.state import TrainingState

FLOOR = 1e-30


@config
class AdaLomoConfig(OptimizerConfig):
    name: Literal["adalomo"] = "adalomo"


class AdaLomo(Fused):
    paper = "Lv et al. 2023, arXiv:2310.10195"
    cost = "a row and a column of state for each matrix and one gradient at a time"

    def state_bytes(self, parameter: nn.Parameter) -> int:
        return 4 * (sum(parameter.shape) if parameter.dim() == 2 else parameter.numel())

    @torch.no_grad()
    def on_start(self, training: TrainingState) -> None:
        self.sizes: dict[nn.Parameter, float] = {}
        for _, _, delta in training.sites():
            W = delta.site.weight()
            for p in delta.parameters():
                if W is not None and p.shape == W.shape:
                    self.sizes[p] = float(_mean_square(W).sqrt())

    def act(self, training: TrainingState, group: dict[str, Any], p: nn.Parameter, g: Tensor) -> None:
        state, b = training.optimizer.state[p], 1 - (training.done + 1) ** -0.8
        u = g  # in its memory: a gradient may be as large as all embeddings
        if p.dim() == 2:
            r = _moved(state, "row", _mean_square(g, 1), b)
            c = _moved(state, "column", _mean_square(g, 0), b)
            u.mul_((r / r.mean()).rsqrt()[:, None]).mul_(c.rsqrt())
        else:
            u.mul_(_moved(state, "square", g.square(), b).rsqrt())
        u.div_(_mean_square(u).sqrt().clamp(min=1.0))
        rate = group["lr"] * max(1e-3, self.sizes.get(p, float(_mean_square(p).sqrt())))
        p.mul_(1 - rate * group["weight_decay"]).sub_(u, alpha=rate)


def _mean_square(t: Tensor, dim: int | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(t, dim=dim)
    return norm.square() / (t.numel() if dim is None else t.shape[dim])


def _moved(state: dict[str, Any], name: str, towards: Tensor, b: float) -> Tensor:
    average: Tensor = state.setdefault(name, torch.zeros_like(towards))
    return average.mul_(b).add_(towards, alpha=1 - b).clamp_(min=FLOOR)
