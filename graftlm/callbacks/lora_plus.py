"""LoRA+: a larger learning rate for B than for A (Hayou, Ghosh and Yu 2024, arXiv:2402.12354).

    eta_B = lambda eta_A

    eta_A   the recipe's learning rate; where it gives none, the method's divided by lambda, so that B has the method's
    lambda  `ratio`

In the limit of wide layers A and B should move by different orders: features are learnt efficiently with eta_A of order
1/n and eta_B of order 1. The authors find ratios from 4 to 64 good and suggest 16, with eta_A lower than LoRA's usual.

What lies at an embedding has a rate of its own, `embedding_rate`, for A and B alike, as in the authors' code and PEFT.
"""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from graftlm.config.schema import PositiveRate, config
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import ParameterGroup, TrainingState


@config
class LoraPlusConfig(CallbackConfig):
    name: Literal["lora-plus"] = "lora-plus"
    ratio: PositiveRate = 16.0
    """The learning rate of B over that of everything else."""
    embedding_rate: PositiveRate = 1e-6
    """The learning rate of a delta on an embedding."""


class LoraPlus(Callback):
    paper = "Hayou, Ghosh and Yu 2024, arXiv:2402.12354"
    cost = "none"

    def refusal(self, training: TrainingState) -> str:
        if not any(_is_B(name) for name in training.parameters()):
            return "it gives the tensors named B a rate of their own, and no delta here has one that is trained"
        return ""

    def default_rate(self, rate: float) -> float:
        return rate / float(self.config.ratio)

    def groups(self, groups: Sequence[ParameterGroup]) -> Sequence[ParameterGroup]:
        made = []
        for group in groups:
            rates = {"A": group.rate, "B": self.config.ratio * group.rate, "embedding": self.config.embedding_rate}
            parts: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in rates}
            for name, p in group.parameters.items():
                kind = "embedding" if name in group.at_embeddings else "B" if _is_B(name) else "A"
                parts[kind][name] = p
            made += [
                ParameterGroup(part, rates[kind], group.at_embeddings.intersection(part))
                for kind, part in parts.items()
                if part
            ]
        return made


def _is_B(name: str) -> bool:
    return name.rpartition(".")[2] == "B"
