"""AdaLoRA's budget: fewer and fewer triplets live, those that matter most. Zhang et al. 2023, arXiv:2303.10512,
Algorithm 1, equations 6 to 12.

For every number w of P [d_out, r], E [r, 1] and Q [r, d_in] of every site:

    I(t)  = |w dL/dw|                                        sensitivity
    I~(t) = beta1 I~(t-1) + (1 - beta1) I(t)                 smoothed
    U~(t) = beta2 U~(t-1) + (1 - beta2) |I(t) - I~(t)|       its uncertainty
    s(w)  = I~(t) U~(t)
    S_i   = s(E_i) + mean_j s(P_ji) + mean_j s(Q_ij)         of the triplet i

Every `every` steps the b(t) triplets of all sites with the greatest S keep their E_i, and the others get E_i = 0. They
go on having gradients, so they may come back. From t = total - final on, which triplets live is fixed.

    b(t) = b0                                                             t <= warmup
         = b1 + (b0 - b1) (1 - (t - warmup) / (total - final - warmup))^3    until total - final, then b1

b0 = r times the number of sites, b1 = `target_r` times that number. `warmup` and `final` are shares of the run here, in
the paper numbers of steps. The sensitivity is that of the weights which the gradient belongs to; the authors' code and
PEFT multiply the gradient with the weights after the step. At equal scores PEFT drops all of them, we the later sites'.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from graftlm.config.schema import PositiveCount, Share, config
from graftlm.training.callback import Callback, CallbackConfig, needs_method
from graftlm.training.state import TrainingState


@config
class AdaLoraCallbackConfig(CallbackConfig):
    name: Literal["adalora"] = "adalora"
    target_r: PositiveCount | None = None
    """Triplets of a site that live at the end, on average; less than the method's `r`, and by default two thirds of
    it: 8 of 12 in the authors' code and PEFT."""
    every: PositiveCount = 10
    """Steps between two decisions."""
    warmup: Share = 0.1
    """Share of the run in which all triplets live."""
    final: Share = 0.3
    """Share of the run, its last, in which nothing is decided any more."""
    beta1: Share = 0.85
    beta2: Share = 0.85


class AdaLoraCallback(Callback):
    paper = "Zhang et al. 2023, arXiv:2303.10512"
    cost = "memory for two more numbers for each trained one; some element-wise products a step"

    def refusal(self, training: TrainingState) -> str:
        if reason := needs_method(training, "adalora"):
            return reason
        if self.config.warmup + self.config.final >= 1:
            return "warmup and final leave no steps in which the budget could fall"
        least, target = self._least(training), self.target(training)
        if target >= least:
            return f"target_r {target} is no less than r {least}: there is nothing to prune"
        return ""

    def on_grads(self, training: TrainingState) -> None:
        if training.done >= self._end(training):
            return
        for name, site, delta in training.sites():
            for key in "PEQ":
                p, beta1, beta2 = delta.get_parameter(key), self.config.beta1, self.config.beta2
                assert p.grad is not None
                sensitivity = (p.detach() * p.grad).abs()
                smooth, unsure = (self.buffer(f"{what}/{name}/{site}.{key}", p) for what in ("smooth", "unsure"))
                smooth.lerp_(sensitivity, 1 - beta1)
                unsure.lerp_((sensitivity - smooth).abs(), 1 - beta2)

    def on_step(self, training: TrainingState) -> None:
        end, start = self._end(training), self._start(training)
        if training.done <= end and (training.done == end or (training.done > start and not self._between(training))):
            self._decide(training, self.budget(training))
        if training.done >= end or not self._between(training):
            self._prune(training)

    def budget(self, training: TrainingState) -> int:
        """b(t): how many triplets live after step t = `training.done`."""
        ranks = [len(delta.get_parameter("E")) for _, _, delta in training.sites()]
        start, end, target = self._start(training), self._end(training), self.target(training) * len(ranks)
        remaining = 1 - min(1.0, max(0.0, (training.done - start) / (end - start)))
        return int(target + (sum(ranks) - target) * remaining**3)

    def target(self, training: TrainingState) -> int:
        return self.config.target_r or max(1, 2 * self._least(training) // 3)

    def _least(self, training: TrainingState) -> int:
        return min(len(delta.get_parameter("E")) for _, _, delta in training.sites())

    def scores(self, training: TrainingState) -> list[Tensor]:
        """S [r] of every site."""
        found = []
        for name, site, delta in training.sites():
            s = {
                key: self.buffer(f"smooth/{name}/{site}.{key}", p) * self.buffer(f"unsure/{name}/{site}.{key}", p)
                for key in "PEQ"
                for p in [delta.get_parameter(key)]
            }
            found.append(s["E"][:, 0] + s["P"].mean(0) + s["Q"].mean(1))
        return found

    def _decide(self, training: TrainingState, budget: int) -> None:
        scores = self.scores(training)
        every = torch.cat(scores)
        lives = torch.zeros_like(every).index_fill_(0, every.argsort(descending=True, stable=True)[:budget], 1.0)
        bounds = [0, *torch.tensor([len(s) for s in scores]).cumsum(0).tolist()]
        for (name, site, _), (first, last) in zip(training.sites(), pairwise(bounds), strict=True):
            self.tensors[f"lives/{name}/{site}"] = lives[first:last].clone()
        ranks = {site: int(self.tensors[f"lives/{name}/{site}"].sum()) for name, site, _ in training.sites()}
        training.events.append({"event": "ranks", "callback": self.config.name, "total": budget, "ranks": ranks})

    @torch.no_grad()
    def _prune(self, training: TrainingState) -> None:
        for name, site, delta in training.sites():
            if (lives := self.tensors.get(f"lives/{name}/{site}")) is not None:
                E = delta.get_parameter("E")
                E.mul_(lives.to(E.device)[:, None])

    def _between(self, training: TrainingState) -> bool:
        return training.done % int(self.config.every) != 0

    def _start(self, training: TrainingState) -> int:
        return int(self.config.warmup * training.total)

    def _end(self, training: TrainingState) -> int:
        """The step at which the last decision is made, at least one after the warm-up."""
        return max(self._start(training) + 1, training.total - int(self.config.final * training.total))
