"""LISA: every so often another few layers learn, the rest wait (Pan et al. 2024, arXiv:2403.17919, algorithm 1).

    every K steps: draw g of the L layers, each as likely as any other; these learn, the others do not

    K  `every`      g  `layers`, 2 in the paper

What lies in no layer (embeddings, the last norm, the head where it is a target) learns throughout, as in the paper.
Waiting tensors have no gradient and no optimizer state: Adam begins anew when their turn comes, as the authors have it.
The saving is that of moments and gradients; the backward pass stops above the lowest layer that learns, unless
embeddings learn too. For any delta: a site belongs to the layer that it lies in.
"""

from typing import Literal

import torch
from torch import nn

from graftlm.config.schema import PositiveCount, config
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState


@config
class LisaConfig(CallbackConfig):
    name: Literal["lisa"] = "lisa"
    layers: PositiveCount = 2
    """How many layers learn at a time."""
    every: PositiveCount = 20
    """Steps between two draws."""


class Lisa(Callback):
    paper = "Pan et al. 2024, arXiv:2403.17919"
    cost = "less than nothing: moments and gradients of a few layers in place of all"

    def refusal(self, training: TrainingState) -> str:
        numbers = {delta.site.layer for _, _, delta in training.sites()} - {None}
        if len(numbers) <= self.config.layers:
            return f"it draws {self.config.layers} layers to learn, and deltas sit in {len(numbers)}"
        return ""

    def idle_parameters(self, training: TrainingState) -> list[nn.Parameter]:
        layers = sorted(self._by_layer(training).values(), key=lambda layer: -sum(p.numel() for p in layer))
        return [p for layer in layers[self.config.layers :] for p in layer]

    def on_start(self, training: TrainingState) -> None:
        if "learning" not in self.facts:
            self._draw(training)
        self._freeze(training)

    def on_step(self, training: TrainingState) -> None:
        if training.done % self.config.every == 0:
            self._draw(training)
            self._freeze(training)

    def on_end(self, training: TrainingState) -> None:
        for p in training.parameters().values():
            p.requires_grad_(True)

    def _draw(self, training: TrainingState) -> None:
        numbers = sorted(self._by_layer(training))
        order = torch.randperm(len(numbers), generator=training.generator("lisa")).tolist()
        self.facts["learning"] = sorted(numbers[i] for i in order[: self.config.layers])
        training.events.append({"event": "lisa", "layers": self.facts["learning"]})

    def _freeze(self, training: TrainingState) -> None:
        for number, parameters in self._by_layer(training).items():
            for p in parameters:
                p.requires_grad_(number in self.facts["learning"])
                if not p.requires_grad:
                    p.grad = None
                    training.optimizer.state.pop(p, None)

    def _by_layer(self, training: TrainingState) -> dict[int, list[nn.Parameter]]:
        found: dict[int, list[nn.Parameter]] = {}
        for _, _, delta in training.sites():
            if delta.site.layer is not None:
                found.setdefault(delta.site.layer, []).extend(delta.parameters())
        return found
