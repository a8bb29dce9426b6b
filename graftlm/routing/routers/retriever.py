"""LoraRetriever: Zhao et al. 2024, arXiv:2402.09997.

    E_n = mean of E(row) over some rows of adapter n          E(prompt) of length 1
    the top_k adapters with the largest cos(E(prompt), E_n)
    mixture   y = W x + 1/k sum_n B_n A_n x                    outputs averaged
    fusion    y = W x + (1/k sum_n B_n) (1/k sum_n A_n) x      parameters averaged

Departures. The paper tunes a sentence encoder by instructions; E is the mean of the base's last hidden states less what
all adapters have in common (`nearest.py`). In a fusion the scale of an adapter is in its B_n.
A fusion is no function of the changes B_n A_n: other factors of the same adapter give another one.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from graftlm.config.schema import Count, PositiveCount, config
from graftlm.routing.base import RequestRouter, RouterConfig
from graftlm.routing.library import Library
from graftlm.routing.nearest import Centroids


@config
class RetrieverConfig(RouterConfig):
    name: Literal["retriever"] = "retriever"
    rows: dict[str, str] = Field(default_factory=dict)
    """Adapter -> rows like those it is for, as `data.train` names them."""
    examples: PositiveCount = 20
    """Rows of each that are looked at."""
    top_k: PositiveCount = 3
    by: Literal["mixture", "fusion"] = "mixture"
    """What is averaged of several adapters: outputs or parameters."""
    seed: Count = 0
    """Of the rows that are drawn."""


class Retriever(RequestRouter):
    paper = "Zhao et al. 2024, arXiv:2402.09997"

    def prepare(self, library: Library) -> None:
        config = self.config
        self.fuses = config.by == "fusion"
        self.centroids = Centroids(
            library, {name: library.examples(name, config.rows, config.examples, config.seed) for name in library.names}
        )

    def weights(self, ids: Sequence[int]) -> Mapping[str, float]:
        nearest = self.centroids.weights(ids, self.config.top_k, 1.0)
        return dict.fromkeys(nearest, 1 / len(nearest))
