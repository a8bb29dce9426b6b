"""Parameter groups, optimiser and schedule."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn


def adamw(groups: Iterable[tuple[Iterable[nn.Parameter], float]], *, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) with betas 0.9 and 0.999; state in float32.

    `groups` are (parameters, learning rate).
    """
    made = [{"params": list(parameters), "lr": rate} for parameters, rate in groups]
    return torch.optim.AdamW(made, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-8, fused=True)


def warmup_cosine(*, steps: int, warmup_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate of step 0, 1, ...: linear from 0 over the warm-up, then half a cosine to 0.

    The warm-up's first factor is 1 / (warmup_steps + 1), not 0: no step is wasted.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
