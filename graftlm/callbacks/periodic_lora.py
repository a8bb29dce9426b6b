"""PeriodicLoRA: stages that are unloaded with momentum. Meng et al. 2024, arXiv:2402.16141, section 3.

    at the end of stage t:  V_t = m V_(t-1) + (1 - m) s B A;  W <- W + V_t;  A, B and the optimizer start again

With m = 0 this is Chain of LoRA (cola.py, where the growing cost and the fixed offset in place of W are explained).
Each V_t is a sum over stages, so W holds B_j A_j with the weight 1 - m^(age in stages): new stages come in by degrees,
old ones whole, and the fixed offset needs one block a stage and no V. With m > 0 the model therefore moves at a
restart, which is the point: a stage that went too far comes in with a part of its step.

What this rests on: the abstract (unloading, a fresh start of weights and optimizer, "momentum-based unloading" against
instability); no text of its equation and no code of its authors was at hand. The recursion above is how we read it. One
implementation by others (hhnqqq/MyTransformers) reads it otherwise: m s B A goes into W, A and B go on as (1 - m) A and
(1 - m) B, so that the model moves too. With m = 0 ours is a whole restart, theirs none.
"""

from typing import Literal

import torch

from graftlm.callbacks.cola import unload, why_no_restart
from graftlm.config.schema import PositiveCount, Share, config
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState


@config
class PeriodicLoraConfig(CallbackConfig):
    name: Literal["periodic-lora"] = "periodic-lora"
    every: PositiveCount = 100
    """Steps of a stage."""
    momentum: Share = 0.1
    """m: how much of a stage's step is put off to the next ones."""


class PeriodicLora(Callback):
    paper = "Meng et al. 2024, arXiv:2402.16141"
    cost = "the rank grows by r at each restart, in time, memory and on disk"
    no_mean = "what was learnt goes into the base and the factors begin again: their mean is of different things"

    def refusal(self, training: TrainingState) -> str:
        return why_no_restart(training, self.config.every)

    @torch.no_grad()
    def on_step(self, training: TrainingState) -> None:
        if training.done % self.config.every or training.done == training.total:
            return
        m, widths = self.config.momentum, []
        for name, site, delta in training.sites():
            stages = self.facts.setdefault(f"{name}/{site}", [])  # where the block of each lies in the offset
            before = 0 if delta.offset_A is None else len(delta.offset_A)
            r = len(delta.factors()[0])  # type: ignore[operator]
            widths.append(unload(training, name, site, delta))
            assert delta.offset_B is not None
            for age, (first, last) in enumerate(reversed(stages), start=1):
                delta.offset_B[:, first:last] *= (1 - m ** (age + 1)) / (1 - m**age)
            delta.offset_B[:, before : before + r] *= 1 - m
            stages.append([before, before + r])
        training.events.append({"event": "restart", "callback": self.config.name, "fixed_rank": max(widths)})
