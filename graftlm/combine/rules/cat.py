"""CAT of LoRA Soups: Prabhakar et al. 2024, arXiv:2410.13025.

    M^l = sum_i a_i^l M_i^l        a_i^l a number for each adapter i and each layer l

The a_i^l are learnt on a few rows of the target task (`graftlm/combine/layer_weights.py`), with everything else frozen.
With them given, CAT is `linear` with weights for each layer. It is exact, as the concatenation of the factors is, after
which the paper names it.

The released code takes a softmax over i, so that the a_i^l of a layer are a mean; here they are free. It learns one a
for each linear layer, as we do. (Read in that code; the equation was not compared with the text of the paper.)
"""

from typing import Literal

from graftlm.combine.rules.base import RuleConfig
from graftlm.combine.rules.linear import Linear
from graftlm.config.schema import PositiveRate, config


@config
class CatConfig(RuleConfig):
    name: Literal["cat"] = "cat"
    learning_rate: PositiveRate = 0.05
    """Of Adam: about how far a weight moves in a step."""


class Cat(Linear):
    paper = "Prabhakar et al. 2024, arXiv:2410.13025"
