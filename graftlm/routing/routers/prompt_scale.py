"""The prompt-conditioned scale of WavLLM: Hu et al. 2024, arXiv:2404.00656, as a router with one adapter.

    y = W x + s(prompt) D x          s = 1 + w . gelu(V E(prompt))

s is learnt on rows with answers, with base and adapter frozen, from s = 1: untrained, this is the adapter. It may turn
an adapter down, or the other way round, for prompts that it is not for.

Departures. WavLLM learns s together with the adapter, from the states of its prompt, in the second stage of a speech
model; here the adapter is there already, and E is the mean of the base's last hidden states of the prompt.
Not checked against the paper beyond the abstract: the sizes of its layers, and whether s is one number.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from graftlm.config.schema import Count, PositiveCount, PositiveRate, config
from graftlm.data.batches.pack import Example
from graftlm.errors import RecipeError
from graftlm.routing.base import RequestRouter, RouterConfig
from graftlm.routing.fit import fit
from graftlm.routing.library import Library, prompt_of


@config
class PromptScaleConfig(RouterConfig):
    name: Literal["prompt-scale"] = "prompt-scale"
    rows: dict[str, str] = Field(default_factory=dict)
    """The adapter -> rows with answers, those that it is for and others."""
    examples: PositiveCount = 200
    """Rows that are used."""
    width: PositiveCount = 32
    steps: PositiveCount = 100
    learning_rate: PositiveRate = 1e-2
    batch_rows: PositiveCount = 4
    seed: Count = 0


class PromptScale(RequestRouter):
    paper = "after Hu et al. 2024, arXiv:2404.00656"

    def prepare(self, library: Library) -> None:
        config = self.config
        if len(library.names) > 1:
            raise RecipeError(
                f"prompt-scale scales one adapter, and here are {len(library.names)}: name it (among)",
                code="one-adapter-alone",
            )
        (self.name,), self.library = library.names, library
        examples = library.examples(self.name, config.rows, config.examples, config.seed)
        vectors = {id(one): library.embed(prompt_of(one)) for one in examples}
        stacked = torch.stack(list(vectors.values()))
        self.shift, self.spread = stacked.mean(0), stacked.std(0, correction=0).clamp_min(1e-6)
        random, d = torch.Generator().manual_seed(config.seed), stacked.shape[1]
        self.V = (torch.randn(config.width, d, generator=random) / d**0.5).to(stacked).requires_grad_()
        self.w = torch.zeros(config.width).to(stacked).requires_grad_()
        present = [stacked[0]]

        def before_row(row: Example) -> None:
            present[0] = vectors[id(row)]

        self.losses = fit(
            library.model,
            {self.name: library.factors(self.name)},
            lambda site, _: lambda x, inner: self._scale(present[0]).expand(len(x), 1),
            [self.V, self.w],
            examples,
            steps=config.steps,
            learning_rate=config.learning_rate,
            batch_rows=config.batch_rows,
            seed=config.seed,
            before_row=before_row,
        )
        for each in (self.V, self.w):
            each.requires_grad_(False)

    def _scale(self, vector: Tensor) -> Tensor:
        return 1 + F.gelu((vector - self.shift) / self.spread @ self.V.T) @ self.w

    def weights(self, ids: Sequence[int]) -> Mapping[str, float]:
        return {self.name: float(self._scale(self.library.embed(ids)))}
