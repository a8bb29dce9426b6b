"""Schedule-free AdamW: a mean of iterates in place of a falling learning rate (Defazio et al. 2024, arXiv:2405.15682).

    y = (1 - b) z + b x        where gradients are taken        g the gradient at y, divided as Adam does
    z <- z - eta g             x <- (1 - c) x + c z             c = eta_max^2 / sum of eta_max^2 so far

    x  what is evaluated and saved      b = `momentum`      eta the recipe's rate: it rises over train.warmup and stays

From its authors' library, which a plain install does not bring: `pip install 'graftlm[schedule-free]'`. Parameters are
y in training, and x in evaluation and in the adapter.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, Strict
from torch import nn

from graftlm.config.schema import config
from graftlm.errors import TrainingError
from graftlm.training.callback import Optimizer, OptimizerConfig, torch_groups
from graftlm.training.state import ParameterGroup, TrainingState


@config
class ScheduleFreeConfig(OptimizerConfig):
    name: Literal["schedule-free"] = "schedule-free"
    momentum: Annotated[float, Strict(), Field(gt=0, lt=1)] = 0.9
    """How near to the mean gradients are taken."""


class ScheduleFree(Optimizer):
    paper = "Defazio et al. 2024, arXiv:2405.15682"
    cost = "none: z stands where Adam has its first moment"
    no_mean = "it keeps a mean of its own, which is what is evaluated and saved"

    def state_bytes(self, parameter: nn.Parameter) -> int:
        return 8 * parameter.numel()

    def make(self, groups: Sequence[ParameterGroup], *, weight_decay: float) -> torch.optim.Optimizer:
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError:
            raise TrainingError(
                "optimizer: schedule-free is a library of its own: pip install 'graftlm[schedule-free]'",
                code="missing-package",
            ) from None
        optimizer: torch.optim.Optimizer = AdamWScheduleFree(
            torch_groups(groups), betas=(self.config.momentum, 0.999), weight_decay=weight_decay
        )
        return optimizer

    def schedule(self, factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: max(map(factor, range(step + 1)))  # it rises as it did, and does not fall

    def on_start(self, training: TrainingState) -> None:
        optimizer: Any = training.optimizer
        optimizer.train()

    @contextmanager
    def evaluating(self, training: TrainingState) -> Iterator[None]:
        points = {p: p.detach().clone() for p in training.parameters().values()}  # to and fro would round
        self.on_end(training)
        try:
            yield
        finally:
            self.on_start(training)
            with torch.no_grad():
                for p, y in points.items():
                    p.copy_(y)

    def on_end(self, training: TrainingState) -> None:
        optimizer: Any = training.optimizer
        optimizer.eval()
