"""Token-level adaptation by centroids: Belofsky 2023, arXiv:2311.10847.

    C_e = mean of E(row) over some rows of adapter e
    g = softmax(cos(E(text so far), C_e) / temperature),  anew for every second token (`every`)
    y = W x + sum_e g_e D_e x

Nothing is learnt. The paper found every second token best.

Departures. E is the mean of the base's last hidden states less what all adapters have in common (`nearest.py`); the
paper has a sentence encoder. With new weights the whole text is computed anew: what other weights left in a cache is
not read, so an answer does not depend on how it was cut into steps.
Not checked against the paper beyond its abstract: its temperature.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from graftlm.config.schema import Count, PositiveCount, PositiveRate, config
from graftlm.routing.base import RouterConfig, StepPass, StepRouter
from graftlm.routing.library import Library
from graftlm.routing.nearest import Centroids


@config
class CentroidsConfig(RouterConfig):
    name: Literal["centroids"] = "centroids"
    rows: dict[str, str] = Field(default_factory=dict)
    """Adapter -> rows like those it is for, as `data.train` names them."""
    examples: PositiveCount = 20
    """Rows of each that are looked at."""
    every: PositiveCount = 2
    """Tokens for which weights stay."""
    temperature: PositiveRate = 0.2
    seed: Count = 0
    """Of the rows that are drawn."""


class TokenCentroids(StepRouter):
    paper = "Belofsky 2023, arXiv:2311.10847"

    def prepare(self, library: Library) -> None:
        config = self.config
        examples = {name: library.examples(name, config.rows, config.examples, config.seed) for name in library.names}
        self.near = Centroids(library, examples)
        self._known: tuple[tuple[int, ...], Mapping[str, float]] = (), {}

    def passes(self, ids: Sequence[int], step: int) -> Sequence[StepPass]:
        text = tuple(ids[: len(ids) - step % self.config.every])
        if self._known[0] != text:
            self._known = text, self.near.weights(text, None, self.config.temperature)
        return [StepPass(self._known[1])]
