"""DLP-LoRA: Zhang and Li 2024, arXiv:2410.01497.

    p = softmax(MLP(E(prompt)))          learnt on some rows of each adapter, by cross-entropy
    T = the likeliest adapters that together have at least top_p, the fewest that do
    g_e = p_e / sum_{T} p for e in T, else 0

The classifier is small (four layers, about 5 million parameters in the paper) and sees a sentence once.

Departures. E is the mean of the base's last hidden states, scaled by their mean and deviation over the rows, and the
layers are as wide as `width`; the paper trains an encoder of its own. The authors' code takes a softmax of the
probabilities in T, which makes them more alike; here they are divided by their sum, as is usual with top-p.
Not checked against the paper beyond its abstract and code: its top_p.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from graftlm.config.schema import Count, PositiveCount, PositiveRate, Weight, config
from graftlm.routing.base import RequestRouter, RouterConfig
from graftlm.routing.library import Library, prompt_of

LAYERS = 4


@config
class ClassifierConfig(RouterConfig):
    name: Literal["classifier"] = "classifier"
    rows: dict[str, str] = Field(default_factory=dict)
    """Adapter -> rows like those it is for, as `data.train` names them."""
    examples: PositiveCount = 50
    """Rows of each that the classifier learns from."""
    top_p: Weight = 0.9
    """The adapters that are used have together at least this probability; 0 is the likeliest alone."""
    width: PositiveCount = 128
    steps: PositiveCount = 200
    learning_rate: PositiveRate = 1e-3
    seed: Count = 0
    """Of the rows that are drawn, and of the starting weights."""


class Classifier(RequestRouter):
    paper = "Zhang and Li 2024, arXiv:2410.01497"

    def prepare(self, library: Library) -> None:
        config, vectors, labels = self.config, list[Tensor](), list[int]()
        for number, name in enumerate(library.names):
            rows = library.examples(name, config.rows, config.examples, config.seed)
            vectors += [library.embed(prompt_of(row)).cpu() for row in rows]
            labels += [number] * len(rows)
        x = torch.stack(vectors)
        self.library, self.shift, self.scale = library, x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
        self.layers = _layers(x.shape[1], config.width, len(library.names), config.seed)
        self._learn((x - self.shift) / self.scale, torch.tensor(labels))

    @torch.enable_grad()
    def _learn(self, x: Tensor, labels: Tensor) -> None:
        parameters = [each.requires_grad_() for layer in self.layers for each in layer]
        optimizer = torch.optim.AdamW(parameters, lr=self.config.learning_rate)
        for _ in range(self.config.steps):
            optimizer.zero_grad()
            F.cross_entropy(self._logits(x), labels).backward()
            optimizer.step()
        for each in parameters:
            each.requires_grad_(False)

    def _logits(self, x: Tensor) -> Tensor:
        for W, b in self.layers[:-1]:
            x = F.gelu(F.linear(x, W, b))
        return F.linear(x, *self.layers[-1])

    def probabilities(self, ids: Sequence[int]) -> Tensor:
        """Of each adapter, in the order of their names [n]."""
        x = (self.library.embed(ids).cpu() - self.shift) / self.scale
        return self._logits(x).double().softmax(0)

    def weights(self, ids: Sequence[int]) -> Mapping[str, float]:
        return nucleus(self.library.names, self.probabilities(ids), self.config.top_p)


def nucleus(names: Sequence[str], p: Tensor, top_p: float) -> dict[str, float]:
    """The fewest of the likeliest names that have `top_p` together, one at least, each with its share of their sum."""
    likeliest = sorted(zip(p.tolist(), names, strict=True), key=lambda each: (-each[0], each[1]))
    chosen, total = dict[str, float](), 0.0
    for probability, name in likeliest:
        if chosen and total >= top_p:
            break
        chosen[name] = probability
        total += probability
    return {name: probability / total for name, probability in chosen.items()}


def _layers(d_in: int, width: int, d_out: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases; weights as normal numbers with the deviation of an input's length."""
    random, sizes = torch.Generator().manual_seed(seed), [d_in, *[width] * (LAYERS - 1), d_out]
    return [(torch.randn(b, a, generator=random) / a**0.5, torch.zeros(b)) for a, b in pairwise(sizes)]
