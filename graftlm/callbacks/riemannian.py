"""Riemannian preconditioning: steps that know how large A and B are (Zhang and Pilanci 2024, arXiv:2402.02347).

    G_A <- (B^T B + delta I)^-1 G_A        G_B <- G_B (A A^T + delta I)^-1        A, G_A [r, d_in]  B, G_B [d_out, r]

Scaled gradient descent on the product B A: the gradient under a metric of matrices of rank r, for which a large B with
a small A learns as a small B with a large A does. `delta` is `damping`: 0.01 as in PEFT, because B starts at zero and
the first steps of A are multiplied by 1 / delta. Clipping comes after this. Adam follows, as in the paper.
"""

from typing import Literal

import torch

from graftlm.callbacks.lora_fa import NO_PAIRS, damped_inverse, pairs
from graftlm.config.schema import PositiveRate, config
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState


@config
class RiemannianConfig(CallbackConfig):
    name: Literal["riemannian"] = "riemannian"
    damping: PositiveRate = 0.01
    """Added to the squares of A and B before they are inverted."""


class Riemannian(Callback):
    paper = "Zhang and Pilanci 2024, arXiv:2402.02347"
    cost = "two r x r inverses a site and step"

    def refusal(self, training: TrainingState) -> str:
        return "" if list(pairs(training)) else NO_PAIRS

    @torch.no_grad()
    def on_grads(self, training: TrainingState) -> None:
        for part in pairs(training):
            A, B = part.A, part.B
            if A.grad is not None:
                A.grad.copy_(damped_inverse(B.T @ B, self.config.damping) @ A.grad)
            if B.grad is not None:
                B.grad.copy_(B.grad @ damped_inverse(A @ A.T, self.config.damping))
