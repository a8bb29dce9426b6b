"""BiLoRA: singular vectors and values learn from different rows. Qiang, Zhang and Xie 2024, arXiv:2403.13037, eqs. 4-8.

    dW = s P diag(E) Q        P [d_out, r]  E [r, 1]  Q [r, d_in]  (method adalora, with its orthogonality penalty)

    lower level:  P, Q <- gradient of L(D1) + R(P, Q)        D1: the rows of training
    upper level:  E    <- gradient of L(D2)                  D2: the inner split, a fifth of the rows (paper: 2 / 10)

Departures: the upper gradient is taken at the P, Q of the same step, and how P, Q would have answered to another E is
left out (the first order of DARTS; the paper unrolls the lower level). Both levels move in one step of one optimizer,
at one rate. The paper's variants that press E towards 0 or 1 are left out.
"""

from typing import ClassVar, Literal

from graftlm.config.schema import config
from graftlm.training.callback import Callback, CallbackConfig, needs_inner_split, needs_method, use_inner_gradient
from graftlm.training.state import TrainingState


@config
class BiLoraConfig(CallbackConfig):
    name: Literal["bilora"] = "bilora"


class BiLora(Callback):
    paper = "Qiang, Zhang and Xie 2024, arXiv:2403.13037"
    cost = "a second forward and backward pass each step, and a fifth of the rows"
    inner_share: ClassVar[float] = 0.2

    def refusal(self, training: TrainingState) -> str:
        return needs_method(training, "adalora") or needs_inner_split(training)

    def on_grads(self, training: TrainingState) -> None:
        use_inner_gradient(training, [delta.get_parameter("E") for _, _, delta in training.sites()])
