"""AdamW: the default optimizer (Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2).

M <- b1 M + (1 - b1) G      V <- b2 V + (1 - b2) G^2
W <- W - eta (M' / (sqrt(V') + eps) + w W)        M', V' divided by 1 - b1^t and 1 - b2^t

G gradient; M, V of its shape in float32, at first 0; w `train.weight_decay`; b1, b2 = 0.9, 0.999, eps = 1e-8
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn

from graftlm.config.schema import config
from graftlm.training.callback import Optimizer, OptimizerConfig
from graftlm.training.state import ParameterGroup


@config
class AdamWConfig(OptimizerConfig):
    name: Literal["adamw"] = "adamw"


class AdamW(Optimizer):
    paper = "Loshchilov and Hutter 2017, arXiv:1711.05101"
    cost = "two float32 moments of each parameter"

    def state_bytes(self, parameter: nn.Parameter) -> int:
        return 8 * parameter.numel()

    def make(self, groups: Sequence[ParameterGroup], *, weight_decay: float) -> torch.optim.Optimizer:
        return adamw([(group.parameters.values(), group.rate) for group in groups], weight_decay=weight_decay)


def adamw(groups: Iterable[tuple[Iterable[nn.Parameter], float]], *, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW for groups of (parameters, learning rate); state in float32."""
    param_groups = [{"params": list(parameters), "lr": rate} for parameters, rate in groups]
    return torch.optim.AdamW(param_groups, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-8, fused=True)
