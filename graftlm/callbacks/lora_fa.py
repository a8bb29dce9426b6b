"""LoRA-FA: A stays, B takes the step that comes nearest to full fine-tuning (Zhang et al. 2023, arXiv:2308.03303).

    G_B <- G_B (A A^T)^-1 / s^2         dW = s B A        A [r, d_in], frozen     B, G_B [d_out, r]

A step D of B changes W by s D A. G_B is s G A^T, with G the gradient of W; the D for which s D A is nearest to G in
the least-squares sense is G_B (A A^T)^-1 / s^2. With A frozen the layer keeps A x [r] for the backward pass, not x.

The inverse is damped by 1e-8, as in the authors' optimizer. Adam then divides by the size of each element, so only what
the product mixes between columns is left of it, and 1 / s^2 only in the clipping, which comes after this.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import config
from graftlm.deltas.lora import Lora
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState

DAMPING = 1e-8


@config
class LoraFaConfig(CallbackConfig):
    name: Literal["lora-fa"] = "lora-fa"


class LoraFa(Callback):
    paper = "Zhang et al. 2023, arXiv:2308.03303"
    cost = "an r x r inverse a site and step; saves A's gradient and moments"

    def refusal(self, training: TrainingState) -> str:
        if any(part.site.kind == "embedding" for part in pairs(training)):
            return "at an embedding A starts at zero and B is random, and with A frozen nothing would be learnt there"
        return "" if list(pairs(training)) else NO_PAIRS

    def idle_parameters(self, training: TrainingState) -> list[nn.Parameter]:
        return [part.A for part in pairs(training)]

    def on_start(self, training: TrainingState) -> None:
        for part in pairs(training):
            part.A.requires_grad_(False)

    @torch.no_grad()
    def on_grads(self, training: TrainingState) -> None:
        for part in pairs(training):
            if part.B.grad is not None:
                part.B.grad.copy_(part.B.grad @ damped_inverse(part.A @ part.A.T, DAMPING) / part.scale**2)

    def on_end(self, training: TrainingState) -> None:
        for part in pairs(training):
            part.A.requires_grad_(True)


NO_PAIRS = "it acts on the factors A and B of a low-rank change s B A, and no delta here trains such a pair"


def pairs(training: TrainingState) -> Iterator[Lora]:
    """Every product s B A among what is trained: A [r, d_in], B [d_out, r], scale s; also inside of another method."""
    for _, _, delta in training.sites():
        yield from (part for part in delta.modules() if isinstance(part, Lora))


def damped_inverse(square: Tensor, damping: float) -> Tensor:
    """(S + damping I)^-1 [r, r] of a positive semi-definite S."""
    inverse: Tensor = torch.linalg.inv(square.double() + damping * torch.eye(len(square), device=square.device))
    return inverse.to(square.dtype)
