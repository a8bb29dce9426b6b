"""ELREA: Li et al. 2025, arXiv:2502.00089.

    u(text) = gradient of the loss of a prompt's own tokens, of length 1        `gradients.py`
    c_e = cos(u(prompt), mean of u over some prompts of adapter e)
    w = softmax((c - mean(c)) / std(c))
    logits = sum_e w_e (logits of the base with adapter e)

In the paper the experts are adapters trained on clusters of one training set, found by these gradients, on top of an
adapter that was trained on all of it. Here they are the adapters of a library, each with some of its rows.

Departures. Gradients are of the base at the layers of the library, in a random projection; the paper has those of its
common adapter, in another random projection. There is no common adapter, so none has a part in the logits.
Not checked against the paper beyond its abstract and summaries: the part of the common adapter in the logits.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from graftlm.config.schema import Count, PositiveCount, config
from graftlm.routing.base import RouterConfig, StepPass, StepRouter
from graftlm.routing.gradients import Gradients
from graftlm.routing.library import Library, prompt_of


@config
class ElreaConfig(RouterConfig):
    name: Literal["elrea"] = "elrea"
    rows: dict[str, str] = Field(default_factory=dict)
    """Adapter -> rows like those it is for, as `data.train` names them."""
    examples: PositiveCount = 20
    """Rows of each that are looked at."""
    columns: PositiveCount = 1
    """Columns to which the gradient of a layer is projected."""
    seed: Count = 0
    """Of the rows that are drawn and of the projection."""


class Elrea(StepRouter):
    paper = "Li et al. 2025, arXiv:2502.00089"

    def prepare(self, library: Library) -> None:
        config, sizes = self.config, dict[str, tuple[int, int]]()
        for name in library.names:
            sizes |= {site: (B.shape[0], A.shape[1]) for site, (A, B) in library.factors(name).items()}
        self.names, self.gradients = library.names, Gradients(library.model, sizes, config.columns, config.seed)
        means = []
        for name in library.names:
            rows = library.examples(name, config.rows, config.examples, config.seed)
            means.append(torch.stack([self.gradients.of(prompt_of(row)) for row in rows]).mean(0))
        self.means = torch.stack(means)
        self._known: tuple[tuple[int, ...], list[float]] = (), []

    def shares(self, ids: Sequence[int]) -> Tensor:
        """w of a prompt [n]."""
        c = torch.nn.functional.cosine_similarity(self.gradients.of(ids)[None], self.means).double()
        spread = c.std(correction=0)
        return ((c - c.mean()) / spread.clamp_min(1e-12)).softmax(0)

    def passes(self, ids: Sequence[int], step: int) -> Sequence[StepPass]:
        prompt = tuple(ids[: len(ids) - step])
        if self._known[0] != prompt:
            self._known = prompt, self.shares(prompt).tolist()
        return [StepPass({name: 1.0}, share) for name, share in zip(self.names, self._known[1], strict=True)]
