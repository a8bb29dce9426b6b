"""IncreLoRA: ranks are added where they help. Zhang et al. 2023, arXiv:2308.12043, section 3.

    dW = s P diag(E) Q of rank r_k at site k (method adalora), beginning with r_k = `first`

    I_k(t)  = sum |dW . dL/dW| / sqrt(d_out d_in)        of the whole site, "." element by element
    I~, U~  as in AdaLoRA (adalora.py), for I_k;         score_k = I~_k U~_k

Every `every` steps after the warm-up the h sites with the greatest scores gain a rank, until there are `target_r` on
average. Each site has one rank in reserve: its p and q learn in advance with E fixed at 1e-5, and when the site grows E
starts to learn from there. At the target the reserves get E = 0.

Departures: h is not given but follows from `until`, the share of the run at which the target is to be reached. All r
ranks of the method are there from the start, E = 0 beyond the reserve, so they cost time and are held orthogonal from
the first step.

A step of one pack on one process needs dL/dW [d_out, d_in] of one site at a time. Where it is several packs, or several
processes share it, those of all sites are added up first.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graftlm import distributed
from graftlm.config.schema import PositiveCount, Share, config
from graftlm.deltas.base import AdditiveDelta, Delta
from graftlm.model.registry import hosts
from graftlm.training.callback import Callback, CallbackConfig, needs_method
from graftlm.training.state import TrainingState

RESERVE = 1e-5


@config
class IncreLoraConfig(CallbackConfig):
    name: Literal["increlora"] = "increlora"
    first: PositiveCount = 1
    """Ranks of each site at the start."""
    target_r: PositiveCount = 8
    """Ranks of a site at the end, on average; at most the method's `r`."""
    every: PositiveCount = 10
    """Steps between two additions."""
    warmup: Share = 0.1
    """Share of the run before the first addition."""
    until: Share = 0.7
    """Share of the run at which the last ranks are added."""
    beta1: Share = 0.85
    beta2: Share = 0.85


class IncreLora(Callback):
    paper = "Zhang et al. 2023, arXiv:2308.12043"
    cost = (
        "while ranks are added, the gradient of every W: about half as much again in time; memory of one W, or of all "
        "where a step is several packs or processes"
    )

    def refusal(self, training: TrainingState) -> str:
        if reason := needs_method(training, "adalora"):
            return reason
        least = min(len(delta.get_parameter("E")) for _, _, delta in training.sites())
        if not self.config.first < self.config.target_r <= least:
            return f"first {self.config.first} < target_r {self.config.target_r} <= r {least} must hold"
        return "" if self._moments(training) else "warmup, until and every leave no step at which a rank is added"

    def on_start(self, training: TrainingState) -> None:
        self.facts.setdefault("ranks", {f"{n}/{site}": self.config.first for n, site, _ in training.sites()})
        self._hold(training)

    @contextmanager
    def during(self, training: TrainingState) -> Iterator[None]:
        self.found: dict[str, float] = {}
        self.sums: dict[str, Tensor] = {}
        handles: list[RemovableHandle] = []
        if training.done < self._moments(training)[-1]:
            at = hosts(training.model)
            for name, site, delta in training.sites():
                assert isinstance(delta, AdditiveDelta)
                handles.append(see_gradient(at[site], partial(self._see, training, f"{name}/{site}", delta)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, training: TrainingState, key: str, delta: AdditiveDelta, G: Tensor) -> None:
        if distributed.count() == 1 and training.last_pack and key not in self.sums:
            self.found[key] = _score(delta, G)  # it is whole already
        else:
            self.sums[key] = self.sums[key].add_(G) if key in self.sums else G

    def on_grads(self, training: TrainingState) -> None:
        for name, site, delta in training.sites():
            E = delta.get_parameter("E")
            assert E.grad is not None
            E.grad[self.facts["ranks"][f"{name}/{site}"] :] = 0
        if training.done < self._moments(training)[-1]:
            here = torch.tensor([self._whole_score(f"{name}/{site}", delta) for name, site, delta in training.sites()])
            smooth, unsure = self.buffer("smooth", here), self.buffer("unsure", here)
            smooth.lerp_(here, 1 - self.config.beta1)
            unsure.lerp_((here - smooth).abs(), 1 - self.config.beta2)

    def _whole_score(self, key: str, delta: Delta) -> float:
        assert isinstance(delta, AdditiveDelta)
        if distributed.count() == 1 and key not in self.sums:
            return self.found.get(key, 0.0)
        return _score(delta, whole_gradient(self.sums.pop(key, None), delta))

    def on_step(self, training: TrainingState) -> None:
        moments = self._moments(training)
        if training.done in moments:
            self._grow(training, moments.index(training.done) + 1, len(moments))
        self._hold(training)

    def _grow(self, training: TrainingState, number: int, of: int) -> None:
        """Give a rank to the sites with the greatest scores, so that after `of` times the target is reached."""
        have: dict[str, int] = self.facts["ranks"]
        first, target = self.config.first * len(have), self.config.target_r * len(have)
        missing = first + (target - first) * number // of - sum(have.values())
        scores = (self.tensors["smooth"] * self.tensors["unsure"]).tolist()
        most = {f"{name}/{site}": len(delta.get_parameter("E")) for name, site, delta in training.sites()}
        order = sorted(zip(scores, have, strict=True), key=lambda pair: -pair[0])
        while missing > 0:  # once around, and again where fewer sites than that are left
            for _, key in order:
                if missing > 0 and have[key] < most[key]:
                    have[key] += 1
                    missing -= 1
        names = {key.partition("/")[2]: r for key, r in have.items()}
        training.events.append({"event": "ranks", "callback": "increlora", "total": sum(have.values()), "ranks": names})

    @torch.no_grad()
    def _hold(self, training: TrainingState) -> None:
        """E of the rank in reserve stays 1e-5, of those after it 0."""
        reserve = RESERVE if training.done < self._moments(training)[-1] else 0.0
        for name, site, delta in training.sites():
            E, r = delta.get_parameter("E"), self.facts["ranks"][f"{name}/{site}"]
            E[r:] = 0
            E[r : r + 1] = reserve

    def _moments(self, training: TrainingState) -> list[int]:
        """The steps after which ranks are added."""
        start, end = int(self.config.warmup * training.total), int(self.config.until * training.total)
        return [t for t in range(max(1, start), end + 1) if t % self.config.every == 0]


@torch.no_grad()
def _score(delta: AdditiveDelta, G: Tensor) -> float:
    return float((delta.matrix() * G).abs().sum()) / math.sqrt(G.numel())


def whole_gradient(G: Tensor | None, delta: Delta) -> Tensor:
    """The sum over the ranks of the gradient of a site's W' [d_out, d_in]; None is a rank without rows."""
    like = next(delta.parameters())
    mine = like.new_zeros(delta.site.d_out, delta.site.d_in) if G is None else G
    holder = nn.Parameter(mine, requires_grad=False)
    holder.grad = mine
    distributed.sum_gradients([holder])
    assert holder.grad is not None
    return holder.grad


def see_gradient(host: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """In every backward pass of this layer, `see` is given the gradient of the loss in W', float32 [d_out, d_in]."""

    def multiply(x: Tensor, gradient: Tensor) -> None:
        with torch.no_grad():
            see(gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float())

    def after(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(partial(multiply, args[0].detach()))

    return host.register_forward_hook(after)
