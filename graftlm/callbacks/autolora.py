"""AutoLoRA: which ranks to keep, learnt from an inner split. Zhang et al. 2024, arXiv:2403.09113, section 3.

    dW = s sum_j g_j b_j a_j^T        g = r softmax(l)        l [r], one vector a site (method gated-lora)

    the first `search` of the run:    A, B <- gradient of L(training rows)    l <- gradient of L(inner split), Adam
    then:                             ranks with g_j below `threshold` are gone, the others have g_j = 1, and A, B are
                                      trained from the start over the rest of the run

The paper's alpha is g / r: here its sum is r, so that the search begins as LoRA does (l = 0). `threshold` counts in the
mean of alpha, 1 / r; each site keeps its best rank at least. Departures: the gradient in l is taken at the A, B of the
step, without how they would have answered (the first order of DARTS; the paper has one step of theirs by finite
differences), and the last training does not get the rows of the inner split back.
"""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graftlm.callbacks.cola import started_anew
from graftlm.config.schema import PositiveRate, Rate, Share, config
from graftlm.training.callback import Callback, CallbackConfig, needs_inner_split, needs_method, use_inner_gradient
from graftlm.training.state import TrainingState


@config
class AutoLoraConfig(CallbackConfig):
    name: Literal["autolora"] = "autolora"
    search: Share = 0.4
    """Share of the run that is spent on searching."""
    rate: PositiveRate = 0.05
    """Learning rate of the selection variables."""
    threshold: Rate = 1.0
    """What of its site's mean a selection variable must reach for its rank to be kept."""


class GateSearch(Callback):
    """Gates of gated-lora that follow from variables, which learn from the inner split and are then made yes or no."""

    cost = "a second forward and backward pass a step while it searches, and a fifth of the rows"
    inner_share: ClassVar[float] = 0.2

    @abstractmethod
    def gates(self, variables: Tensor) -> Tensor:
        """[r] -> the gates [r] of a site, 1 where the variables are 0."""

    @abstractmethod
    def binary_gates(self, found: list[Tensor]) -> list[Tensor]:
        """The learned gates of all sites -> 1 for a rank that stays, 0 for one that is removed."""

    def refusal(self, training: TrainingState) -> str:
        if reason := needs_method(training, "gated-lora") or needs_inner_split(training):
            return reason
        return "" if self._last(training) >= 2 else "search leaves no two steps to search in"

    def on_start(self, training: TrainingState) -> None:
        if training.done >= self._last(training):
            self._fix(training)

    def on_grads(self, training: TrainingState) -> None:
        if training.done >= self._last(training):
            return
        use_inner_gradient(training, [delta.get_parameter("g") for _, _, delta in training.sites()])
        for name, site, delta in training.sites():
            g = delta.get_parameter("g")
            variables = self.buffer(f"variables/{name}/{site}", g).clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.gates(variables), variables, g.grad)
            self._adam(f"{name}/{site}", gradient, training.done + 1)
            g.grad = None  # the optimizer leaves it alone

    def _adam(self, key: str, gradient: Tensor, t: int) -> None:
        """One step of Adam with betas 0.9 and 0.999."""
        mean, square = self.buffer(f"mean/{key}", gradient), self.buffer(f"square/{key}", gradient)
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square(), 0.001)
        step = (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        self.tensors[f"variables/{key}"].sub_(self.config.rate * step)

    @torch.no_grad()
    def on_step(self, training: TrainingState) -> None:
        if training.done > self._last(training):
            return
        sites = list(training.sites())
        found = [self.gates(self.buffer(f"variables/{name}/{site}", d.get_parameter("g"))) for name, site, d in sites]
        if training.done == self._last(training):
            found = self.binary_gates(found)
            self._begin_again(training)
            ranks = {site: int(g.sum()) for (_, site, _), g in zip(sites, found, strict=True)}
            event = {"event": "ranks", "callback": self.config.name, "total": sum(ranks.values()), "ranks": ranks}
            training.events.append(event)
        for (_, _, delta), g in zip(sites, found, strict=True):
            delta.get_parameter("g").copy_(g)
        if training.done == self._last(training):
            self._fix(training)

    def _begin_again(self, training: TrainingState) -> None:
        for name, site, delta in training.sites():
            fresh = started_anew(training, name, site, delta)
            for p, start in zip(delta.parameters(), fresh.parameters(), strict=True):
                p.copy_(start)
                training.optimizer.state.pop(p, None)

    def _fix(self, training: TrainingState) -> None:
        """Gates are decided: they do not learn any more, nor does anything at a site that has none open."""
        for _, _, delta in training.sites():
            g = delta.get_parameter("g")
            for p in [g] if g.any() else list(delta.parameters()):
                p.requires_grad_(False)
                p.grad = None

    def _last(self, training: TrainingState) -> int:
        return int(self.config.search * training.total)


class AutoLora(GateSearch):
    paper = "Zhang et al. 2024, arXiv:2403.09113"

    def gates(self, variables: Tensor) -> Tensor:
        return len(variables) * variables.softmax(0)

    def binary_gates(self, found: list[Tensor]) -> list[Tensor]:
        return [((g >= self.config.threshold) | (g == g.max())).to(g.dtype) for g in found]
