"""DiffoRA: which sites get a LoRA at all, learnt from an inner split. Jiang, Wang and Yuan 2025, arXiv:2502.08905.

    dW = s a B A        a = 2 sigmoid(v)        v, one number a site (the r gates of method gated-lora, all alike)

    the first `search` of the run:    A, B <- gradient of L(training rows)    v <- gradient of L(inner split), Adam
    then:                             the share `keep` of the sites with the greatest a stay, and A, B are trained from
                                      the start over the rest of the run

The a of all sites are the paper's relaxed differential adaptation matrix, by sigmoid and doubled, so that the search
begins as LoRA does. Departures: the gradient in v is of first order (autolora.py), the sites are chosen among all of
the model's and not row by row of the matrix, and what the paper lets modules share in the search is here their own.
"""

from typing import Literal

import torch
from torch import Tensor

from graftlm.callbacks.autolora import GateSearch
from graftlm.config.schema import PositiveRate, Share, config
from graftlm.training.callback import CallbackConfig


@config
class DiffoRAConfig(CallbackConfig):
    name: Literal["diffora"] = "diffora"
    search: Share = 0.4
    """Share of the run that is spent on searching."""
    rate: PositiveRate = 0.05
    """Learning rate of the selection variables."""
    keep: Share = 0.5
    """Share of the sites that keep their LoRA, one at least."""


class DiffoRA(GateSearch):
    paper = "Jiang, Wang and Yuan 2025, arXiv:2502.08905"

    def gates(self, variables: Tensor) -> Tensor:
        return (2 * variables.mean().sigmoid()).expand(len(variables))

    def binary_gates(self, found: list[Tensor]) -> list[Tensor]:
        values = torch.stack([g[0] for g in found])
        best = values.topk(max(1, round(self.config.keep * len(found)))).indices.tolist()
        return [torch.full_like(g, number in best) for number, g in enumerate(found)]
