"""SpIEL's moves: indices are dropped and grown. Ansell et al. 2024, arXiv:2401.16405, section 3, the variant SpIEL-AG.

    every S steps, of the k indices eta of each site (method spiel) with their changes phi:

    drop   the n with the smallest |phi - phi of the last time|; there W' is W again
    grow   the n other indices with the greatest |dL/dW'|; their phi starts at 0, and so does what Adam knows of them
    n      = share k (1 + cos(pi t / T)) / 2, falling to 0 at T = `until` of the run

The paper adds up gradients over some steps, for candidates of the first of them; here it is the gradient of the one
step before the move, whole. That n falls along a cosine is RigL's rule (Evci et al. 2019, arXiv:1911.11134).
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.callbacks.increlora import see_gradient, whole_gradient
from graftlm.config.schema import PositiveCount, Share, config
from graftlm.model.registry import hosts
from graftlm.training.callback import Callback, CallbackConfig, needs_method
from graftlm.training.state import TrainingState


@config
class SpielCallbackConfig(CallbackConfig):
    name: Literal["spiel"] = "spiel"
    every: PositiveCount = 20
    """S: steps between two moves."""
    share: Share = 0.2
    """Share of the indices that is moved the first time."""
    until: Share = 0.8
    """Share of the run after which nothing is moved any more."""


class SpielCallback(Callback):
    paper = "Ansell et al. 2024, arXiv:2401.16405"
    cost = "at a move the whole gradient of every W, in time and memory; between moves none"
    no_mean = "a number stands for another element of W after each move: the mean would be of different elements"

    def refusal(self, training: TrainingState) -> str:
        if reason := needs_method(training, "spiel"):
            return reason
        if any(delta.site.kind != "linear" for _, _, delta in training.sites()):
            return "where to grow is read off what goes in and comes out of a linear layer; an embedding has neither"
        return "" if self.config.every <= self.config.until * training.total else "nothing is moved before `until`"

    def on_start(self, training: TrainingState) -> None:
        for name, site, delta in training.sites():
            self.tensors.setdefault(f"last/{name}/{site}", delta.get_parameter("phi").detach().clone())

    @contextmanager
    def during(self, training: TrainingState) -> Iterator[None]:
        self.gradients: dict[str, Tensor] = {}
        with ExitStack() as stack:
            if self._moves(training.done + 1, training):
                at = hosts(training.model)
                for _, site, _ in training.sites():
                    stack.callback(see_gradient(at[site], partial(self._add, site)).remove)
            yield

    def _add(self, site: str, G: Tensor) -> None:
        self.gradients[site] = G if site not in self.gradients else self.gradients[site].add_(G)

    def on_grads(self, training: TrainingState) -> None:
        if not self._moves(training.done + 1, training):
            return
        for _, site, delta in training.sites():
            self.gradients[site] = whole_gradient(self.gradients.get(site), delta)

    @torch.no_grad()
    def on_step(self, training: TrainingState) -> None:
        if not self._moves(training.done, training):
            return
        moved = 0
        for name, site, delta in training.sites():
            eta, phi, last = delta.get_buffer("eta"), delta.get_parameter("phi"), self.tensors[f"last/{name}/{site}"]
            n = self.count(training, len(phi))
            dropped = (phi - last.to(phi.device)).abs().topk(n, largest=False).indices
            eligible = self.gradients[site].abs().flatten().index_fill(0, eta, -1.0)
            n = min(n, int((eligible >= 0).sum()))
            dropped = dropped[:n]
            eta[dropped] = eligible.topk(n).indices
            for tensor in (phi, *_moments(training.optimizer, phi)):
                tensor[dropped] = 0
            self.tensors[f"last/{name}/{site}"] = phi.detach().clone()
            moved += n
        self.gradients = {}
        training.events.append({"event": "moved", "callback": "spiel", "indices": moved})

    def count(self, training: TrainingState, k: int) -> int:
        """How many of k indices move after step t = `training.done`."""
        part = training.done / (self.config.until * training.total)
        return int(self.config.share * k * (1 + math.cos(math.pi * min(1.0, part))) / 2)

    def _moves(self, t: int, training: TrainingState) -> bool:
        return t % int(self.config.every) == 0 and t <= self.config.until * training.total


def _moments(optimizer: torch.optim.Optimizer, phi: nn.Parameter) -> list[Tensor]:
    """The optimizer's moments of phi."""
    values = optimizer.state.get(phi, {}).values()
    return [value for value in values if isinstance(value, Tensor) and value.shape == phi.shape]
