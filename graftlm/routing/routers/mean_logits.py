"""LoRA Composite for text: after Zhong et al. 2024, arXiv:2402.16843.

    logits = 1/n sum_e logits of the base with adapter e

The paper makes images: there the scores of denoising with each LoRA are averaged, here logits. A baseline; a token
costs as much as n tokens.
"""

from collections.abc import Sequence
from typing import Literal

from graftlm.config.schema import config
from graftlm.routing.base import RouterConfig, StepPass, StepRouter
from graftlm.routing.library import Library


@config
class MeanLogitsConfig(RouterConfig):
    name: Literal["mean-logits"] = "mean-logits"


class MeanLogits(StepRouter):
    paper = "after Zhong et al. 2024, arXiv:2402.16843"

    def prepare(self, library: Library) -> None:
        self.names = library.names

    def passes(self, ids: Sequence[int], step: int) -> Sequence[StepPass]:
        return [StepPass({name: 1.0}, 1 / len(self.names)) for name in self.names]
