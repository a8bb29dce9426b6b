"""Chain of LoRA: merge and restart. Xia, Qin and Hazan 2024, arXiv:2401.04151, Algorithm 1.

    every T steps:  W <- W + s B A;  A, B drawn anew (B = 0);  the optimizer forgets them

Here the base is never changed (docs/decisions/003): s B A goes into the fixed offset of the delta, by concatenation,

    W' = W + s B A - offset_B offset_A
    offset_A [k, d_in] <- [offset_A; A]   offset_B [d_out, k] <- [offset_B, -s B]

so the adapter stays removable, is exactly what a chain would have left in W, and exports as a LoRA of rank r times the
links of the chain. The price is that rank in each step from then on: after n restarts a step costs what LoRA of rank
(n + 1) r costs, and the adapter is as large. Merging into W is `graft merge`, once the run is done.

Any delta with factors will do; what is drawn anew is its trained tensors, by the method's own start. Where that start
is no zero, it is taken out by one more pair of factors. The last link stays what it is.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, Delta
from graftlm.training.callback import Callback, CallbackConfig
from graftlm.training.state import TrainingState


@config
class ColaConfig(CallbackConfig):
    name: Literal["cola"] = "cola"
    every: PositiveCount = 100
    """Steps of each link of the chain."""


class Cola(Callback):
    paper = "Xia, Qin and Hazan 2024, arXiv:2401.04151"
    cost = "the rank grows by r at each restart, in time, memory and on disk"
    no_mean = "what was learnt goes into the base and the factors begin again: their mean is of different things"

    def refusal(self, training: TrainingState) -> str:
        return why_no_restart(training, self.config.every)

    def on_step(self, training: TrainingState) -> None:
        if training.done % self.config.every == 0 and training.done < training.total:
            ranks = [unload(training, name, site, delta) for name, site, delta in training.sites()]
            training.events.append({"event": "restart", "callback": self.config.name, "fixed_rank": max(ranks)})


def why_no_restart(training: TrainingState, every: int) -> str:
    """Why what was learnt cannot be put into a fixed B A every so many steps, or an empty text."""
    for _, _, delta in training.sites():
        if not isinstance(delta, AdditiveDelta) or delta.factors() is None:
            return (
                f"what {delta.config.method} learnt is no product B A, so it cannot be kept in the fixed offset when "
                "the delta starts again (the base itself is never changed)"
            )
    if every < 2:
        return "a stage needs at least two steps: in its first, A has no gradient, for B is zero"
    return f"no stage of {every} steps ends before the run of {training.total} does" if every >= training.total else ""


@torch.no_grad()
def unload(training: TrainingState, name: str, site: str, delta: Delta) -> int:
    """Put what this delta adds into its fixed offset and let it start again; returns the rank of the offset."""
    A, B = factors_of(delta)
    fresh = started_anew(training, name, site, delta)
    for parameter, start in zip(delta.parameters(), fresh.parameters(), strict=True):
        parameter.copy_(start)
        training.optimizer.state.pop(parameter, None)
    A0, B0 = factors_of(delta)
    grow(delta, A, -B)
    if (B0 @ A0).count_nonzero():
        grow(delta, A0, B0)
    assert delta.offset_A is not None
    return len(delta.offset_A)


def factors_of(delta: Delta) -> tuple[Tensor, Tensor]:
    """(A, B) as they are now, copies."""
    assert isinstance(delta, AdditiveDelta)
    factors = delta.factors()
    assert factors is not None
    A, B = factors
    return A.detach().clone(), B.detach().clone()


def started_anew(training: TrainingState, name: str, site: str, delta: Delta) -> Delta:
    """The same delta as its method starts it, with a seed for this step of the run."""
    seed = int(torch.randint(2**31, (1,), generator=training.generator(f"restart/{name}/{site}")))
    fresh = type(delta)(replace(delta.site, seed=seed), delta.config)
    fresh.start()
    return fresh


def grow(delta: Delta, A: Tensor, B: Tensor) -> None:
    """Let the delta act on W - B A, beside what its offset was already."""
    delta.offset_A = A if delta.offset_A is None else torch.cat([delta.offset_A, A])
    delta.offset_B = B if delta.offset_B is None else torch.cat([delta.offset_B, B], dim=1)
