"""Texts that are near to a prompt, by vectors of the base."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graftlm.data.batches.pack import Example
from graftlm.routing.base import softmax_of_top
from graftlm.routing.library import Library, prompt_of


class Centroids:
    """The mean vector of the example prompts of each name, and the cosine of a prompt with them.

        c_n = mean over rows of e(prompt) - m        m = mean of the means, e a vector of length 1
        cos(e(prompt) - m, c_n)

    Departures from the papers that use it: they take a sentence encoder, here e is the mean of the base's own last
    hidden states. Such vectors have much in common, whatever the text says, so what all names have in common, m, is
    taken off where there are several names.
    """

    def __init__(self, library: Library, examples: Mapping[str, Sequence[Example]]) -> None:
        self.library, self.names = library, tuple(examples)
        means = torch.stack([_mean(library, rows) for rows in examples.values()])
        self.center = means.mean(0) if len(means) > 1 else torch.zeros_like(means[0])
        self.centroids = means - self.center

    def similarities(self, ids: Sequence[int]) -> Tensor:
        """The cosine of a prompt with each name [n]."""
        vector = (self.library.embed(ids) - self.center)[None]
        return torch.nn.functional.cosine_similarity(vector, self.centroids, dim=1)

    def weights(self, ids: Sequence[int], top_k: int | None, temperature: float) -> dict[str, float]:
        """softmax(cosine / temperature) over the `top_k` nearest names."""
        found = softmax_of_top(self.similarities(ids)[None].double(), top_k, temperature)[0].tolist()
        return {name: weight for name, weight in zip(self.names, found, strict=True) if weight > 0}


def _mean(library: Library, rows: Sequence[Example]) -> Tensor:
    return torch.stack([library.embed(prompt_of(row)) for row in rows]).mean(0)
