"""LoRA+: a larger learning rate for B than for A (Hayou, Ghosh and Yu 2024, arXiv:2402.12354).

    eta_B = lambda eta_A

    eta_A   the recipe's learning rate
    lambda  `ratio`

In the limit of wide layers A and B should move by different orders: features are learnt efficiently with eta_A of order
1/n and eta_B of order 1. The authors find ratios from 4 to 64 good and suggest 16, with eta_A lower than LoRA's usual.
"""

from collections.abc import Sequence
from typing import Literal

from graftlm.config import PositiveRate, config
from graftlm.training.policies.base import ParameterGroup, Policy, PolicyConfig, Training


@config
class LoraPlusConfig(PolicyConfig):
    name: Literal["lora-plus"] = "lora-plus"
    ratio: PositiveRate = 16.0
    """The learning rate of B over that of everything else."""


class LoraPlus(Policy):
    paper = "Hayou, Ghosh and Yu 2024, arXiv:2402.12354"
    cost = "none"

    def refuse(self, training: Training) -> str:
        if not any(_is_B(name) for name in training.parameters()):
            return "it gives the tensors named B a rate of their own, and no delta here has one that is trained"
        return ""

    def groups(self, groups: Sequence[ParameterGroup]) -> Sequence[ParameterGroup]:
        made = []
        for group in groups:
            for wanted, factor in ((False, 1.0), (True, self.config.ratio)):
                part = {name: p for name, p in group.parameters.items() if _is_B(name) is wanted}
                made += [ParameterGroup(part, factor * group.rate)] if part else []
        return made


def _is_B(name: str) -> bool:
    return name.rpartition(".")[2] == "B"
