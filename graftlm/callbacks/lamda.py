"""LaMDA's schedule: B is frozen bit by bit. Azizi et al. 2024, arXiv:2406.12832, section 3.

    at step t of the first T:    the first round(r (1 - t / T)) columns of PMB [d_out, r] learn
    from step T on:              none does; S [r, r] alone learns

The columns belong to singular values of W in falling order, so those of the least go first. T is the share `until` of
the run (the paper: 30 % of the steps). A frozen column stays exactly where it is, whatever momentum the optimizer has;
when all are frozen, their gradient is not computed any more.

The 30 % stand in the authors' code too (ArminAzizi98/LaMDA). Which end goes first is by a survey of the paper: their
code has no singular values, zeroes gradients from the first column on, and, lacking a factor r, stops at one.
"""

from typing import Literal

import torch
from torch import Tensor

from graftlm.config.schema import Weight, config
from graftlm.training.callback import Callback, CallbackConfig, needs_method
from graftlm.training.state import TrainingState


@config
class LamdaCallbackConfig(CallbackConfig):
    name: Literal["lamda"] = "lamda"
    until: Weight = 0.3
    """Share of the run after which B is frozen as a whole."""


class LamdaCallback(Callback):
    paper = "Azizi et al. 2024, arXiv:2406.12832"
    cost = "a copy of the frozen columns for the length of a step; later no gradient of B: less time and memory"

    def refusal(self, training: TrainingState) -> str:
        return needs_method(training, "lamda")

    def on_start(self, training: TrainingState) -> None:
        self.before: list[Tensor] = []
        self._freeze(training)

    def learning(self, training: TrainingState, r: int) -> int:
        """How many of r columns learn in the step after `training.done`."""
        end = self.config.until * training.total
        return round(r * (1 - training.done / end)) if training.done < end else 0

    def on_grads(self, training: TrainingState) -> None:
        self.before = []
        for _, _, delta in training.sites():
            B = delta.get_parameter("PMB")
            count = self.learning(training, B.shape[1]) if B.requires_grad else B.shape[1]
            if B.grad is not None:
                B.grad[:, count:] = 0
            self.before.append(B.detach()[:, count:].clone())

    @torch.no_grad()
    def on_step(self, training: TrainingState) -> None:
        for (_, _, delta), columns in zip(training.sites(), self.before, strict=True):
            if columns.shape[1]:
                delta.get_parameter("PMB")[:, -columns.shape[1] :] = columns
        self._freeze(training)

    def _freeze(self, training: TrainingState) -> None:
        for _, _, delta in training.sites():
            B = delta.get_parameter("PMB")
            if B.requires_grad and not self.learning(training, B.shape[1]):
                B.requires_grad_(False)
                B.grad = None
