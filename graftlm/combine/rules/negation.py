"""Task negation, to unlearn: Ilharco et al. 2023, arXiv:2212.04089, section 3.

    M = -scale sum_i w_i M_i

The result takes away from the base what the adapters had added.
"""

from typing import Literal

from graftlm.combine.rules.base import Convention, RuleConfig
from graftlm.combine.rules.linear import Linear
from graftlm.config.schema import PositiveRate, config


@config
class NegationConfig(RuleConfig):
    name: Literal["negation"] = "negation"
    scale: PositiveRate = 1.0
    """The paper chooses it on held-out rows: the largest that leaves other tasks as they are."""


class Negation(Linear):
    paper = "Ilharco et al. 2023, arXiv:2212.04089"

    def __init__(self, config: NegationConfig, convention: Convention | None = None) -> None:
        super().__init__(config, convention)
        self.scale = -config.scale
