"""AdamW in 8 bits: moments in codes, with a scale for each block of 256 (Dettmers et al. 2021, arXiv:2110.02861).

    M ~ s_M q(M)        V ~ s_V q(V)        s the largest of each block, q one of 256 values that lie denser near zero

AdamW in all else: each step takes the codes apart, moves the moments as AdamW does, and codes them again. Tensors of
fewer than 4096 elements keep moments of 32 bits. From bitsandbytes, on CPUs too.

`paged` keeps the moments in memory that a GPU shares with the machine and fetches them as needed (Dettmers et al. 2023,
arXiv:2305.14314, section 3), so that a long row's activations may push them out for the moment.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from graftlm.config.schema import Flag, config
from graftlm.errors import TrainingError
from graftlm.training.callback import Optimizer, OptimizerConfig, torch_groups
from graftlm.training.state import ParameterGroup

LEAST = 4096
"""bitsandbytes keeps moments of 32 bits for tensors with fewer elements."""


@config
class AdamW8bitConfig(OptimizerConfig):
    name: Literal["adamw-8bit"] = "adamw-8bit"
    paged: Flag = False
    """Let a GPU's moments give way to the machine's memory."""


class AdamW8bit(Optimizer):
    paper = "Dettmers et al. 2021, arXiv:2110.02861"
    cost = "2 bytes of moments a parameter in place of 8; a step of the optimizer takes longer on a CPU"

    def state_bytes(self, parameter: nn.Parameter) -> int:
        n = parameter.numel()
        return 8 * n if n < LEAST else 2 * n + 8 * -(-n // 256)  # codes, and a scale for each block

    def make(self, groups: Sequence[ParameterGroup], *, weight_decay: float) -> torch.optim.Optimizer:
        if self.config.paged and any(p.device.type == "cpu" for group in groups for p in group.parameters.values()):
            raise TrainingError(
                "optimizer: adamw-8bit: paged is for GPUs, and the model is on a CPU: leave it out",
                code="gpu-only-setting",
            )
        try:
            from bitsandbytes.optim import AdamW
        except ImportError:
            raise TrainingError(
                "optimizer: adamw-8bit is from bitsandbytes: pip install 'graftlm[4bit]'", code="missing-package"
            ) from None
        optimizer: torch.optim.Optimizer = AdamW(
            torch_groups(groups), weight_decay=weight_decay, optim_bits=8, is_paged=self.config.paged
        )
        return optimizer
