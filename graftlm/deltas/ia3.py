"""(IA)^3: Infused Adapter by Inhibiting and Amplifying Inner Activations. Liu et al. 2022, arXiv:2205.05638, 3.3.

    h = l * (W x + b)        l [d_out, 1]: keys and values
    h = W (l * x) + b        l [1, d_in]: the inner activations of the feed-forward layer, which its second matrix reads

l starts at 1.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import config
from graftlm.deltas.base import AroundDelta, Base, DeltaConfig, PeftLayout, Site, Targets, matches

INNER = r".*\.(down_proj|fc2|wo|w2|fc_out|dense_4h_to_h|mlp\.c_proj)"


@config
class Ia3Config(DeltaConfig):
    method: Literal["ia3"] = "ia3"
    targets: Targets = rf".*\.(k_proj|v_proj|key|value|query_key_value|qkv_proj|c_attn)|{INNER}"
    feed_forward: Targets = INNER
    """Which of the targets scale their input."""


class Ia3(AroundDelta):
    family = "addition"
    paper = "Liu et al. 2022, arXiv:2205.05638"
    formula = "d_in if inner else d_out"
    learning_rate = 0.032
    peft = PeftLayout(
        type="IA3",
        tensors={"l": "ia3_l"},
        fields={"feed_forward": "feedforward_modules"},
        harmless=("init_ia3_weights",),
    )

    def __init__(self, site: Site, config: Ia3Config) -> None:
        super().__init__(site, config)
        self.inner = matches(config.feed_forward, site.name)
        self.l = nn.Parameter(torch.ones((1, site.d_in) if self.inner else (site.d_out, 1)))

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W * self.l, b if b is None or self.inner else b * self.l[:, 0]

    def input(self, x: Tensor) -> Tensor:
        return x * self.l if self.inner else x

    def output(self, z: Tensor, x: Tensor, base: Base) -> Tensor:
        return z if self.inner else z * self.l[:, 0]
