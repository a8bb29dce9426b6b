"""ALoRA: ranks move to where leaving them out hurts. Liu et al. 2024, arXiv:2403.16187, sections 3.2 and 3.3.

    IS(i) = S(M) - S(M without rank i) + S(M with rank i alone)        S: minus the loss on the inner split (AB-LoRA)

Each site of a LoRA begins with `first` of its r ranks. Every `every` steps, until `until` of the run, the `moves` ranks
with the least IS are switched off (their columns of B are zero and stay so); sites that lost none gain one each, in the
order of their mean IS, until as many ranks are on as before. B A counts the ranks that are on alone, so what is left
is a plain LoRA.

The equation is taken from a survey of the paper; no code, of its authors or of others, was found to check it with.

Departures: the paper scores by the task's metric on a batch of validation rows, here it is the loss; and a rank that is
given to a site starts like LoRA's own, B at zero. The optimizer keeps what it knew of that column.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from graftlm.config.schema import PositiveCount, Weight, config
from graftlm.training.callback import Callback, CallbackConfig, needs_inner_split, needs_method
from graftlm.training.state import TrainingState


@config
class AloraConfig(CallbackConfig):
    name: Literal["alora"] = "alora"
    first: PositiveCount = 8
    """Ranks of each site that are on at the start; less than the method's `r`, up to which a site can grow."""
    moves: PositiveCount = 8
    """Ranks that are moved each time."""
    every: PositiveCount = 50
    """Steps between two times."""
    until: Weight = 0.7
    """Share of the run after which nothing is moved any more."""


class Alora(Callback):
    paper = "Liu et al. 2024, arXiv:2403.16187"
    cost = "each time two forward passes over the inner split for every rank that is on: thousands in a whole model"
    inner_share: ClassVar[float] = 0.05

    def refusal(self, training: TrainingState) -> str:
        if reason := needs_method(training, "lora") or needs_inner_split(training):
            return reason
        least = min(len(delta.get_parameter("A")) for _, _, delta in training.sites())
        if self.config.first >= least:
            return f"first {self.config.first} is no less than r {least}: no site could gain a rank"
        last = self.config.until * training.total
        return "" if self.config.every <= last else f"no {self.config.every} steps pass before ranks are fixed"

    def on_start(self, training: TrainingState) -> None:
        for name, site, delta in training.sites():
            if f"on/{name}/{site}" not in self.tensors:
                on = torch.zeros(len(delta.get_parameter("A")))
                on[: self.config.first] = 1
                self.tensors[f"on/{name}/{site}"] = on
        self._hold(training)

    def on_grads(self, training: TrainingState) -> None:
        for name, site, delta in training.sites():
            B = delta.get_parameter("B")
            if B.grad is not None:
                B.grad *= self.tensors[f"on/{name}/{site}"].to(B.device)

    def on_step(self, training: TrainingState) -> None:
        if training.done % self.config.every == 0 and training.done <= self.config.until * training.total:
            self._move(training)
        self._hold(training)

    @torch.no_grad()
    def importance(self, training: TrainingState) -> list[Tensor]:
        """IS [r] of every site, -inf for ranks that are off."""
        assert training.inner_loss is not None
        self._hold(training)
        factors = [delta.get_parameter("B") for _, _, delta in training.sites()]
        masks = [self.tensors[f"on/{name}/{site}"] for name, site, _ in training.sites()]
        before, found = [B.clone() for B in factors], [torch.full_like(on, -torch.inf) for on in masks]
        whole = -float(training.inner_loss(False))
        for B, B_before, on, score in zip(factors, before, masks, found, strict=True):
            for i in on.nonzero()[:, 0].tolist():
                B[:, i] = 0
                score[i] = whole + float(training.inner_loss(False))
                B[:, i] = B_before[:, i]
        for B in factors:
            B.zero_()
        for B, B_before, on, score in zip(factors, before, masks, found, strict=True):
            for i in on.nonzero()[:, 0].tolist():
                B[:, i] = B_before[:, i]
                score[i] -= float(training.inner_loss(False))
                B[:, i] = 0
        for B, B_before in zip(factors, before, strict=True):
            B.copy_(B_before)
        return found

    def _move(self, training: TrainingState) -> None:
        scores = self.importance(training)
        keys = [f"on/{name}/{site}" for name, site, _ in training.sites()]
        masks = [self.tensors[key] for key in keys]
        ranked = sorted((float(s[i]), k, i) for k, s in enumerate(scores) for i in masks[k].nonzero()[:, 0].tolist())
        means = [float(s[on.bool()].mean()) if on.any() else -torch.inf for s, on in zip(scores, masks, strict=True)]
        losers, ranks_off = set(), 0
        for _, k, i in ranked[: self.config.moves]:
            masks[k][i] = 0
            losers.add(k)
            ranks_off += 1
        gains = [k for k in sorted(range(len(keys)), key=lambda k: -means[k]) if k not in losers and not masks[k].all()]
        while ranks_off and gains:
            for k in gains[:ranks_off]:
                masks[k][int((masks[k] == 0).nonzero()[0, 0])] = 1
                ranks_off -= 1
            gains = [k for k in gains if not masks[k].all()]
        ranks = {site: int(on.sum()) for (_, site, _), on in zip(training.sites(), masks, strict=True)}
        training.events.append({"event": "ranks", "callback": "alora", "total": sum(ranks.values()), "ranks": ranks})

    @torch.no_grad()
    def _hold(self, training: TrainingState) -> None:
        for name, site, delta in training.sites():
            B = delta.get_parameter("B")
            B.mul_(self.tensors[f"on/{name}/{site}"].to(B.device))
