"""ALLoRA: rows of B that are near zero take larger steps (Huang and Balestriero 2024, arXiv:2410.09692).

    D_i <- D_i / sqrt(||B_i|| + 1 / eta^2)        B_i [r] row i of B [d_out, r], D_i what the optimizer adds to it

B starts at zero, where the factor is eta (`escape`); as a row grows the factor falls, so that what scales LoRA is
learnt for each row and no alpha is needed: give `alpha` equal to `r`, and no dropout, as the authors do.

The equation is taken from a survey of the paper; no code, of its authors or of others, was found to check it with.

Departures: the paper multiplies the gradient, for SGD. Adam divides such a factor out again, so here it multiplies the
step that the optimizer took. B_i is as before the step. What the weight decay took is multiplied with it.
"""

from typing import Literal

import torch
from torch import Tensor

from graftlm.callbacks.lora_fa import NO_PAIRS, pairs
from graftlm.config.schema import PositiveRate, config
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState


@config
class AlloraConfig(CallbackConfig):
    name: Literal["allora"] = "allora"
    escape: PositiveRate = 4.0
    """The factor on the learning rate of a row of B that is still zero."""


class Allora(Callback):
    paper = "Huang and Balestriero 2024, arXiv:2410.09692"
    cost = "a copy of every B within each step"

    def refusal(self, training: TrainingState) -> str:
        return "" if list(pairs(training)) else NO_PAIRS

    @torch.no_grad()
    def on_grads(self, training: TrainingState) -> None:
        self.before: list[Tensor] = [part.B.clone() for part in pairs(training)]

    @torch.no_grad()
    def on_step(self, training: TrainingState) -> None:
        for part, before in zip(pairs(training), self.before, strict=True):
            factor = (before.norm(dim=1, keepdim=True) + self.config.escape**-2).rsqrt()
            part.B.copy_(before + factor * (part.B - before))
        self.before = []
