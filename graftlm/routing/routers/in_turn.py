"""LoRA Switch for text: after Zhong et al. 2024, arXiv:2402.16843.

    token t of the answer is predicted with adapter  floor(t / every) mod n,  in the order of their names

The paper makes images: there the active LoRA changes every few steps of denoising. A step here is a token. A baseline.
"""

from collections.abc import Sequence
from typing import Literal

from graftlm.config.schema import PositiveCount, config
from graftlm.routing.base import RouterConfig, StepPass, StepRouter
from graftlm.routing.library import Library


@config
class InTurnConfig(RouterConfig):
    name: Literal["in-turn"] = "in-turn"
    every: PositiveCount = 1
    """Tokens after which it is the next adapter's turn."""


class InTurn(StepRouter):
    paper = "after Zhong et al. 2024, arXiv:2402.16843"

    def prepare(self, library: Library) -> None:
        self.names = library.names

    def passes(self, ids: Sequence[int], step: int) -> Sequence[StepPass]:
        return [StepPass({self.names[step // self.config.every % len(self.names)]: 1.0})]
