"""SHiRA: Sparse High Rank Adapters. Bhardwaj et al. 2024, arXiv:2406.13175, section 3.1.

    W' = W + S        S [d_out, d_in] is zero but for k = r (d_in + d_out) fixed places, where it is learnt, at first 0

k is what a LoRA of rank r has (PEFT's rule; the paper trains 1 to 2 % of W), and no scale is needed (lemma 4.3).

    random       k places drawn at random (SHiRA-Rand)
    magnitude    where |W| is largest (SHiRA-WM, which the paper's language models use)

Left out: masks of rows and columns (Struct) and by gradients (Grad, SNIP).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, PeftLayout, Site
from graftlm.errors import TargetError


@config
class ShiraConfig(DeltaConfig):
    method: Literal["shira"] = "shira"
    r: PositiveCount = 16
    mask: Literal["random", "magnitude"] = "random"


class Shira(AdditiveDelta):
    family = "specification"
    paper = "Bhardwaj et al. 2024, arXiv:2406.13175"
    formula = "r * (d_in + d_out)"
    learning_rate = 2e-3
    peft = PeftLayout(
        type="SHIRA",
        tensors={"S": "shira_weight", "places": "shira_indices"},
        fields={"r": "r"},
        defaults={"r": 32},
        harmless=("mask_type", "random_seed"),  # the places are in the file
    )
    places: Tensor

    def __init__(self, site: Site, config: ShiraConfig) -> None:
        super().__init__(site, config)
        k, all_of_it = config.r * (site.d_in + site.d_out), site.d_in * site.d_out
        if k > all_of_it:
            raise TargetError(
                f"shira: {site.name} has {all_of_it} weights, r = {config.r} would choose {k} of them",
                code="rank-too-large",
            )
        self.S = nn.Parameter(torch.zeros(k))
        self.register_buffer("places", torch.zeros(2, k, dtype=torch.int32))
        self.mask = config.mask

    def start(self) -> None:
        k, site = len(self.S), self.site
        if self.mask == "magnitude":
            flat_places = site.W().abs().flatten().topk(k).indices
        else:
            flat_places = torch.randperm(site.d_in * site.d_out, generator=site.generator())[:k]
        flat_places = flat_places.sort().values
        self.places.copy_(torch.stack([flat_places // site.d_in, flat_places % site.d_in]))

    def matrix(self) -> Tensor:
        row, column = self.places.long()
        return self.S.new_zeros(self.site.d_out, self.site.d_in).index_put((row, column), self.S)
