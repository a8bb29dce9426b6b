"""The learning rate over the steps of a run."""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["cosine", "linear", "constant", "warmup-stable-decay"]


def learning_rate_factor(
    schedule: Schedule, *, steps: int, warmup_steps: int, decay_steps: int = 0
) -> Callable[[int], float]:
    """The factor on the learning rate of step 0, 1, ...: linear from 0 over the warm-up, then as `schedule` says.

        cosine                half a cosine from 1 to 0 (Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts)
        linear                a line from 1 to 0
        constant              1
        warmup-stable-decay   1, and over the last `decay_steps` a line to 0 (Hu et al. 2024, arXiv:2404.06395; Hagele
                              et al. 2024, arXiv:2405.18392)

    0 would be reached at step `steps`, which is none of them. The warm-up's first factor is 1 / (warmup_steps + 1), not
    0: no step is wasted.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if schedule == "linear":
            return 1 - progress
        if schedule == "constant":
            return 1.0
        return min(1.0, max(0.0, (steps - step) / max(1, decay_steps)))

    return factor


def warmup_cosine(*, steps: int, warmup_steps: int) -> Callable[[int], float]:
    """`learning_rate_factor` of the schedule `cosine`."""
    return learning_rate_factor("cosine", steps=steps, warmup_steps=warmup_steps)
