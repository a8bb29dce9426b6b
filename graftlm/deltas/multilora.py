"""MultiLoRA: Democratizing LoRA for Better Multi-Task Learning. Wang et al. 2023, arXiv:2311.11501, section 4.

    h = W x + sum_i diag(s_i) B_i A_i x        i = 1 .. parts;  A_i [r, d_in]  B_i [d_out, r]  s_i [d_out]

Several narrow LoRAs side by side. All A_i and B_i start random (Kaiming-uniform), which spreads the increment over many
directions; s_i starts at zero, so that dW = 0. There is no alpha: s_i is the scale. At an embedding A_i is drawn for a
one-hot x (`starts.py`).

The A_i lie below each other in A [parts * r, d_in] and the B_i beside each other in B [d_out, parts * r].
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Flag, PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site
from graftlm.deltas.starts import uniform_A


@config
class MultiLoraConfig(DeltaConfig):
    method: Literal["multilora"] = "multilora"
    r: PositiveCount = 8
    """Rank of each part."""
    parts: PositiveCount = 3
    """How many LoRAs lie side by side."""
    per_output: Flag = True
    """Whether s_i has a number for each output, or is one number."""


class MultiLora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Wang et al. 2023, arXiv:2311.11501"
    formula = "parts * (r * (d_in + d_out) + (d_out if per_output else 1))"
    learning_rate = 8e-3
    kinds = ("linear", "embedding")

    def __init__(self, site: Site, config: MultiLoraConfig) -> None:
        super().__init__(site, config)
        rows, draw = config.parts * config.r, site.generator()
        self.A = nn.Parameter(uniform_A(site, rows, draw))
        self.B = nn.Parameter((2 * torch.rand(site.d_out, rows, generator=draw) - 1) / config.r**0.5)
        self.s = nn.Parameter(torch.zeros(site.d_out if config.per_output else 1, config.parts))

    def factors(self) -> tuple[Tensor, Tensor]:
        parts = self.s.shape[1]
        return self.A, (self.B.unflatten(1, (parts, -1)) * self.s[:, :, None]).flatten(1)
