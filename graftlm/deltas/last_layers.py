"""Fine-tuning of the last layers: FT-top2 in Li and Liang 2021, arXiv:2101.00190, section 5, and in the tables of LoRA.

    W' = W + D        for every weight W of the last `last` transformer layers        b' = b + d

A baseline: all that lies in those layers learns, their norms and biases included; embeddings, the final norm and the
output head stay. Held as a difference, like full fine-tuning. A model without numbered layers counts as one layer.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AroundDelta, Base, DeltaConfig, Site, Targets
from graftlm.deltas.full import Full, FullConfig


@config
class LastLayersConfig(DeltaConfig):
    method: Literal["last-layers"] = "last-layers"
    last: PositiveCount = 2
    """How many transformer layers learn, counted from the output."""
    targets: Targets = "all"

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        layers = [site.layer for site in sites if site.layer is not None]
        if not layers:
            return sites
        return [site for site in sites if site.layer is not None and site.layer > max(layers) - self.last]


class LastLayers(AroundDelta):
    family = "specification"
    paper = "Li and Liang 2021, arXiv:2101.00190"
    formula = Full.formula
    kinds = ("linear", "norm")

    def __init__(self, site: Site, config: LastLayersConfig) -> None:
        super().__init__(site, config)
        self.full = Full(site, FullConfig())

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.full.effective(W, b)

    def input(self, x: Tensor) -> Tensor | None:
        return self.full.input(x)

    def output(self, z: Tensor, x: Tensor, base: Base) -> Tensor:
        return self.full.output(z, x, base)
