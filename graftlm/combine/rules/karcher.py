"""Karcher mean: Karcher 1977, Comm. Pure Appl. Math. 30(5), on the sphere of directions; Wang et al. 2026,
arXiv:2603.04972, for language models.

    u_i = M_i / ||M_i||        sum_i w_i log_u(u_i) = 0        M = (sum_i w_i ||M_i||) u        sum_i w_i = 1

log_u(v) is the tangent at u that points to v and has the length of the arc. The fixed point of
u <- exp_u(sum_i w_i log_u(u_i)), from the weighted sum of the u_i. Of two changes of equal norm it is SLERP, and every
space of products gives the same. Directions that point away from each other have no mean: that is an error.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from graftlm.combine.rules.base import Rule, RuleConfig
from graftlm.config.schema import config
from graftlm.errors import AdapterError

ROUNDS, CLOSE = 1000, 1e-12


@config
class KarcherConfig(RuleConfig):
    name: Literal["karcher"] = "karcher"


class Karcher(Rule):
    paper = "Wang et al. 2026, arXiv:2603.04972"
    relative = True

    def merge(self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        norms = torch.stack([M.norm() for M in matrices])
        w = torch.tensor(weights, dtype=norms.dtype)
        length = float((w * norms).sum())
        if length == 0:
            return torch.zeros_like(matrices[0])
        units = torch.stack([M.flatten() / norm for M, norm in zip(matrices, norms, strict=True) if norm > 0])
        w = w[norms > 0] / w[norms > 0].sum()
        u: Tensor = w @ units
        if float(u.norm()) > CLOSE:
            u = u / u.norm()
            for _ in range(ROUNDS):
                cosine = (units @ u).clamp(-1, 1)
                away = units - cosine[:, None] * u
                sine = away.norm(dim=1)
                arcs = torch.where(sine > CLOSE, torch.atan2(sine, cosine) / sine.clamp_min(CLOSE), 0.0)
                tangent = (w * arcs) @ away
                step = float(tangent.norm())
                if step < CLOSE:
                    return length * u.view_as(matrices[0])
                u = u * torch.cos(tangent.norm()) + tangent / step * torch.sin(tangent.norm())
                u = u / u.norm()
        raise AdapterError(
            "karcher: the changes point away from each other, so their directions have no mean: use linear, or fewer "
            "adapters",
            code="no-mean-direction",
        )
