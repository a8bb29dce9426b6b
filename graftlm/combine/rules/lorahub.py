"""The sum of factors of LoraHub: Huang et al. 2023, arXiv:2307.13269, stage `compose`.

    A = sum_i w_i s_i^1/2 A_i        B = sum_i w_i s_i^1/2 B_i

    B A = sum_i w_i^2 s_i B_i A_i + the products of one adapter's B with another's A

So weight w of one adapter is w^2 of its change, and the sign of all weights together does not matter. The authors'
adapters have one scale; with several, its root is in each factor, so that one adapter with weight 1 is itself.
"""

from typing import Literal

from graftlm.combine.rules.base import RuleConfig
from graftlm.combine.rules.linear import Linear
from graftlm.config.schema import config


@config
class LorahubConfig(RuleConfig):
    name: Literal["lorahub"] = "lorahub"


class Lorahub(Linear):
    paper = "Huang et al. 2023, arXiv:2307.13269"
    spaces = ("factors",)
    weighs_factors = True
