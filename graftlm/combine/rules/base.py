"""What a rule is: matrices of one site and weights in, one matrix out.

    merge([M_1 .. M_n], [w_1 .. w_n], generator) -> M        M_i [m, n], float64

What the M_i are is the business of the space (`graftlm/combine/spaces.py`). An adapter of weight 0 is not among them,
except in PEFT's convention. Where the sources of a rule differ, `conventions` names them. In the convention `paper` one
adapter with weight 1 gives that adapter, whatever others with weight 0 stand beside it.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, Strict
from torch import Tensor

from graftlm.combine.spaces import OF_PRODUCTS, Space
from graftlm.config.schema import config

Convention = Literal["paper", "peft", "mergekit"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

PositiveShare = Annotated[float, Strict(), Field(gt=0, le=1)]


@config
class RuleConfig:
    """The base of all configs of rules; each adds `name`, its key in COMPOSERS, and its options."""

    name: str


class Rule:
    """Made as `Class(config, convention)`, once for a composition."""

    paper: ClassVar[str]
    spaces: ClassVar[tuple[Space, ...]] = OF_PRODUCTS
    """The spaces where the rule has a meaning, its default first."""
    conventions: ClassVar[tuple[Convention, ...]] = ("paper",)
    """The sources that differ, the default first."""
    relative: ClassVar[bool] = False
    """Whether weights are shares of one whole: they must be above 0, and their sum does not matter."""
    weighs_factors: ClassVar[bool] = False
    """Whether in space `factors` the A_i and the B_i each have the weight itself, not its root."""
    most: ClassVar[int | None] = None
    """The largest number of adapters."""
    scale: float = 1.0
    """A factor on the result."""
    energy: float = 1.0
    """The share of ||M||^2 of the result that is kept."""

    def __init__(self, config: Any, convention: Convention | None = None) -> None:
        self.config = config
        self.convention: Convention = convention or self.conventions[0]

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """The rule on matrices of one shape, each with its weight. The arguments are not changed."""
        raise NotImplementedError


class MomentRule(Rule):
    """A rule that also takes, for each matrix, the second moment of the adapter's inputs."""

    needs_moments: ClassVar[bool] = True
    """Whether there is no `merge` without them."""

    def prepared(self, moment: Tensor) -> Tensor:
        """What the rule makes of a second moment [d_in, d_in], before it is brought into a space."""
        return moment

    def merge_with(self, matrices: Sequence[Tensor], weights: Sequence[float], moments: Sequence[Tensor]) -> Tensor:
        """The rule on matrices [m, n], each with its weight and its moment [n, n]. The arguments are not changed."""
        raise NotImplementedError


def weighted_sum(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i M_i."""
    total = torch.zeros_like(matrices[0])
    for M, weight in zip(matrices, weights, strict=True):
        total.add_(M, alpha=weight)
    return total
