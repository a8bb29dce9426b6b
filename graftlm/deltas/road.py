"""RoAd: 2D Rotary Adaptation. Liao and Monz 2024, arXiv:2409.00119, equation 4.

    h = R (W x + b)        R = diag(R_1 .. R_n), n = d_out / 2, each R_i 2 x 2: it turns and stretches a pair of outputs

    R_i = [ alpha_11 cos theta_11   -alpha_12 sin theta_12 ]        theta at first 0, alpha at first 1: R = I
          [ alpha_21 sin theta_21    alpha_22 cos theta_22 ]

    RoAd_1    one theta and one alpha for all four entries: a rotation and a length        d_out numbers a layer
    RoAd_2    one of each for each row: theta_11 = theta_12, theta_21 = theta_22           2 d_out
    RoAd_4    all of them                                                                  4 d_out

R h is element by element: h * c + partner(h) * s with c = alpha cos theta of the diagonal, s = alpha sin theta beside
it, and partner(h) = -h_2 where h_1 stands and h_1 where h_2 does. So it costs no matrix product.

Outputs are paired inside groups of `group_size`: number i of the first half with number i of the second. 2 is the
paper's pairing of neighbors; PEFT has 64 by default. theta and alpha are laid out as PEFT's, group after group.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AroundDelta, Base, DeltaConfig, PeftLayout, Site
from graftlm.errors import TargetError


@config
class RoadConfig(DeltaConfig):
    method: Literal["road"] = "road"
    variant: Literal[1, 2, 4] = 1
    """How many angles, and scales, a pair of outputs has."""
    group_size: PositiveCount = 2
    """Outputs in whose two halves partners stand; even, and a divisor of the outputs of every layer."""

    def __post_init__(self) -> None:
        if self.group_size % 2:
            raise ValueError(f"group_size is {self.group_size}, which has no two halves: make it even")


VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}
"""PEFT's names."""


def variant(site: Site, config: RoadConfig) -> dict[str, Any]:
    return {"variant": f"road_{config.variant}"}


class Road(AroundDelta):
    family = "reparameterisation"
    paper = "Liao and Monz 2024, arXiv:2409.00119"
    formula = "variant * d_out"
    learning_rate = 1.6e-2
    peft = PeftLayout(
        type="ROAD",
        tensors={"theta": "road_theta", "alpha": "road_alpha"},
        fields={"group_size": "group_size"},
        defaults={"group_size": 64},
        facts=variant,
        translate=lambda stored: {"variant": VARIANTS.get(stored.get("variant", "road_1"), stored.get("variant"))},
    )

    def __init__(self, site: Site, config: RoadConfig) -> None:
        super().__init__(site, config)
        self.variant, self.group = config.variant, config.group_size
        if site.d_out % self.group:
            raise TargetError(
                f"road: group_size is {self.group}, which does not divide the {site.d_out} outputs of {site.name}: "
                "choose a number that does, by `patterns` if it is to differ there",
                code="indivisible-layer",
            )
        self.theta = nn.Parameter(torch.zeros(self.variant * site.d_out // 2))
        self.alpha = nn.Parameter(torch.ones(self.variant * site.d_out // 2))

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._turned(W.T).T, None if b is None else self._turned(b)

    def output(self, z: Tensor, x: Tensor, base: Base) -> Tensor:
        return self._turned(z)

    def _turned(self, h: Tensor) -> Tensor:
        """R h for each h [d_out] of [.. d_out]."""
        cos, sin = self.alpha * self.theta.cos(), self.alpha * self.theta.sin()
        shape = (-1, 2, self.group // 2)  # [groups, half, pair]
        if self.variant == 4:
            c, s = cos.view(-1, *shape[1:])[0::2], sin.view(-1, *shape[1:])[1::2]
        else:
            c, s = (t.view(-1, self.variant, self.group // 2).expand(shape) for t in (cos, sin))
        halves = h.unflatten(-1, shape)
        one, other = halves.unbind(-2)
        turned: Tensor = (halves * c + torch.stack([-other, one], dim=-2) * s).flatten(-3)
        return turned
