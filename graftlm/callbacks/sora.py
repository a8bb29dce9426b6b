"""SoRA: a proximal step pulls the gates of ranks to zero. Ding et al. 2023, arXiv:2311.11696, equations 5 to 7.

    g <- T(g - eta dL/dg, eta lambda)        T(x, t) = sign(x) max(|x| - t, 0)        g [r], the gates of gated-lora

    eta     the learning rate of this step
    lambda  `sparsity`; rising linearly to `sparsity_last` where that is given (the authors' schedule, Algorithm 1,
            which raises it step by step to see what is forgotten first)

The step from which the threshold is taken is the optimizer's, whichever that is (AdamW: the authors' too). Their main
optimizer subtracts lambda itself, a second one of theirs eta lambda, as the paper has it and we do. A gate at zero has
a gradient still and may open again. The ranks that are left are said at the end of the run.
"""

from typing import Literal

import torch
from torch import nn

from graftlm.config.schema import PositiveRate, config
from graftlm.training.callback import Callback, CallbackConfig, needs_method
from graftlm.training.state import TrainingState


@config
class SoraConfig(CallbackConfig):
    name: Literal["sora"] = "sora"
    sparsity: PositiveRate = 1.0
    """lambda: with a rate of 2e-3, gates that nothing pulls open again are shut after 500 steps."""
    sparsity_last: PositiveRate | None = None
    """lambda at the last step, towards which it rises or falls evenly; the same all through where nothing is said."""


class Sora(Callback):
    paper = "Ding et al. 2023, arXiv:2311.11696"
    cost = "none"

    def refusal(self, training: TrainingState) -> str:
        return needs_method(training, "gated-lora")

    @torch.no_grad()
    def on_step(self, training: TrainingState) -> None:
        for _, g, rate in self._gates(training):
            g.copy_(nn.functional.softshrink(g, rate * self.sparsity(training)))
        if training.done == training.total:
            ranks = {site: int(g.count_nonzero()) for site, g, _ in self._gates(training)}
            training.events.append({"event": "ranks", "callback": "sora", "total": sum(ranks.values()), "ranks": ranks})

    def sparsity(self, training: TrainingState) -> float:
        """lambda of the step that was just made."""
        first: float = self.config.sparsity
        last = first if self.config.sparsity_last is None else self.config.sparsity_last
        return first + (last - first) * (training.done - 1) / max(1, training.total - 1)

    def _gates(self, training: TrainingState) -> list[tuple[str, nn.Parameter, float]]:
        rates = {id(p): group["lr"] for group in training.optimizer.param_groups for p in group["params"]}
        gates = [(site, delta.get_parameter("g")) for _, site, delta in training.sites()]
        return [(site, g, rates[id(g)]) for site, g in gates]
