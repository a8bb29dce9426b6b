"""PEFT's `add_weighted_adapter(combination_type="linear")`, for results that equal PEFT's (0.21.2, lora/model.py).

    A = sum_i sgn(w_i) sqrt(|w_i| s_i) A_i        B = sum_i sqrt(|w_i| s_i) B_i

    B A = sum_i w_i s_i B_i A_i + the products of one adapter's B with another's A

The second part means nothing: it changes with the basis in which an adapter's factors are written. It is reported as
the cross share; for two random adapters with weights .5 and .5 it is as large as the whole. `linear` has none.
"""

from typing import Literal

from graftlm.combine.rules.base import RuleConfig
from graftlm.combine.rules.linear import Linear
from graftlm.config.schema import config


@config
class PeftLinearConfig(RuleConfig):
    name: Literal["peft-linear"] = "peft-linear"


class PeftLinear(Linear):
    paper = "PEFT 0.21.2"
    spaces = ("factors",)
    conventions = ("peft",)
