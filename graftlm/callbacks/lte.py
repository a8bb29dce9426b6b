"""LoRA-the-Explorer: heads that learn apart and are averaged. Huh et al. 2024, arXiv:2402.16828, Algorithm 1.

    head n of N:  T steps of its own on its own rows, on the weights  W_n + s B_n A_n
    then          W <- W + mean_n s (B_n A_n - B'_n A'_n)        B'_n A'_n: the same at the last time
    and           W_n = W - s B_n A_n                            so all heads go on from the same point, none restarts

The paper's heads work side by side on as many devices. Here they take turns on one, T steps each: the same numbers from
N times the steps. A batch belongs to the head whose turn it is, so heads see different rows. The sum over time is
telescopic: W after a round is the base + mean_n s B_n A_n, so what the heads share is one fixed offset of rank N r,
which does not grow (the base itself is never changed), and

    W_n = base - offset_B offset_A        offset_A = [A_1; ...; A_N]   offset_B = s [c_1 B_1, ..., c_N B_N]
    c_j = -1 / N, and 1 - 1 / N for the head itself

After the last step, and wherever the run is looked at, the model is the base and the mean of what the heads have then.
The authors start A orthogonal and large; here each head starts as its method does, with a draw of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.callbacks.cola import factors_of, started_anew, why_no_restart
from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import Delta
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState

STATE = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of a tensor."""


@config
class LteConfig(CallbackConfig):
    name: Literal["lte"] = "lte"
    heads: PositiveCount = 4
    every: PositiveCount = 10
    """T: steps of one head before the next has its turn; after `heads` turns they are averaged."""


class Lte(Callback):
    paper = "Huh et al. 2024, arXiv:2402.16828"
    cost = "N times the delta and its optimizer's state in memory; N + 1 times the rank in a step and in the adapter"
    no_mean = "its heads take turns: the mean would be of different heads"

    def refusal(self, training: TrainingState) -> str:
        if not isinstance(training.optimizer, torch.optim.AdamW):
            return "each head keeps AdamW's state of its own, and this run has another optimizer"
        if not self.facts.get("began") and any(delta.offset_A is not None for _, _, delta in training.sites()):
            return "the heads' mean takes the place of a fixed offset, which this init has; take `init: zero`"
        return why_no_restart(training, self.config.every)

    def on_start(self, training: TrainingState) -> None:
        self.facts["began"] = True

    def on_step(self, training: TrainingState) -> None:
        turn, remainder = divmod(training.done, int(self.config.every))
        if remainder:
            return
        heads = self.config.heads
        for name, site, delta in training.sites():
            key = f"{name}/{site}"
            self._put_away(training, f"{(turn - 1) % heads}/{key}", delta)
            if turn % heads == 0:
                self._average(key)
            self._take_out(training, f"{turn % heads}/{key}", name, site, delta)
            self._share(key, turn % heads, delta)
        if turn % heads == 0:
            training.events.append({"event": "averaged", "callback": "lte", "heads": heads})

    def on_end(self, training: TrainingState) -> None:
        """Average the heads as they are now, whichever head is being trained."""
        now = training.done // self.config.every % self.config.heads
        for name, site, delta in training.sites():
            self._put_away(training, f"{now}/{name}/{site}", delta)
            self._average(f"{name}/{site}")
            self._share(f"{name}/{site}", now, delta)

    @contextmanager
    def evaluating(self, training: TrainingState) -> Iterator[None]:
        """Inside, the model is what it would be if the run ended here."""
        tensors = dict(self.tensors)
        offsets = [(delta, delta.offset_A, delta.offset_B) for _, _, delta in training.sites()]
        self.on_end(training)
        try:
            yield
        finally:
            self.tensors.clear()
            self.tensors.update(tensors)
            for delta, A, B in offsets:
                delta.offset_A, delta.offset_B = A, B

    def _put_away(self, training: TrainingState, key: str, delta: Delta) -> None:
        for number, p in enumerate(delta.parameters()):
            self.tensors[f"{key}/{number}"] = p.detach().clone()
            for name, moment in training.optimizer.state.get(p, {}).items():
                self.tensors[f"{key}/{number}/{name}"] = moment.clone()
        self.tensors[f"{key}/A"], self.tensors[f"{key}/B"] = factors_of(delta)

    @torch.no_grad()
    def _take_out(self, training: TrainingState, key: str, name: str, site: str, delta: Delta) -> None:
        fresh = None if f"{key}/0" in self.tensors else list(started_anew(training, name, site, delta).parameters())
        for number, p in enumerate(delta.parameters()):
            p.copy_(self.tensors[f"{key}/{number}"] if fresh is None else fresh[number])
            self._restore(training.optimizer, p, f"{key}/{number}")

    def _restore(self, optimizer: torch.optim.Optimizer, p: nn.Parameter, key: str) -> None:
        optimizer.state.pop(p, None)
        found = {what: self.tensors[f"{key}/{what}"].clone() for what in STATE if f"{key}/{what}" in self.tensors}
        if found:
            optimizer.state[p] = {what: t if what == "step" else t.to(p.device) for what, t in found.items()}

    def _average(self, key: str) -> None:
        """Copy the factors of all heads: their mean stands for the heads until the next average."""
        for head in range(self.config.heads):
            for letter in "AB":
                if (factor := self.tensors.get(f"{head}/{key}/{letter}")) is not None:
                    self.tensors[f"{head}/{key}/mean/{letter}"] = factor.clone()

    def _share(self, key: str, own: int, delta: Delta) -> None:
        """Let head `own` act on the base and the mean, less its own part of what was averaged."""
        means: list[tuple[int, Tensor]] = [
            (head, mean_A)
            for head in range(self.config.heads)
            if (mean_A := self.tensors.get(f"{head}/{key}/mean/A")) is not None
        ]
        if not means:
            return
        like, heads = next(delta.parameters()), self.config.heads
        parts = [((head == own) - 1 / heads) * self.tensors[f"{head}/{key}/mean/B"] for head, _ in means]
        delta.offset_A = torch.cat([A for _, A in means]).to(like.device)
        delta.offset_B = torch.cat(parts, dim=1).to(like.device)
