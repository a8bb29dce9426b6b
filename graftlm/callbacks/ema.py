"""EMA: what is kept is a running mean of the parameters (Morales-Brotons et al. 2024, arXiv:2411.18704, equation 1).

    E <- a E + (1 - a) W        after every step; W a parameter, E its mean, at first W        a = `decay`

The run is not changed by it: W goes on as it would. Evaluation and the adapter at the end have E. In the first steps a
is no more than t / (t + 9), as is usual, so that the start is forgotten in short runs too (the paper leaves it open).
Refused beside callbacks after which a parameter is not what it was before: they say why (`no_mean`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from graftlm.config.schema import Share, config
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState


@config
class EmaConfig(CallbackConfig):
    name: Literal["ema"] = "ema"
    decay: Share = 0.99
    """The share of the mean that a step keeps: 1 / (1 - decay) steps count."""


class Ema(Callback):
    paper = "Morales-Brotons et al. 2024, arXiv:2411.18704"
    cost = "a copy of what is trained"
    no_mean = "it keeps a mean of its own"

    def conflict(self, others: Sequence[Callback]) -> str:
        return next((f"{other.config.name}: {other.no_mean}" for other in others if other.no_mean), "")

    def on_start(self, training: TrainingState) -> None:
        for name, p in training.parameters().items():
            self.tensors[name] = self.tensors[name].to(p.device) if name in self.tensors else p.detach().clone()

    @torch.no_grad()
    def on_step(self, training: TrainingState) -> None:
        t = training.done
        a = min(self.config.decay, t / (t + 9))
        for name, p in training.parameters().items():
            self.tensors[name].lerp_(p, 1 - a)

    @contextmanager
    def evaluating(self, training: TrainingState) -> Iterator[None]:
        before = {name: p.detach().clone() for name, p in training.parameters().items()}
        self.on_end(training)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in training.parameters().items():
                    p.copy_(before[name])

    @torch.no_grad()
    def on_end(self, training: TrainingState) -> None:
        for name, p in training.parameters().items():
            p.copy_(self.tensors[name])
