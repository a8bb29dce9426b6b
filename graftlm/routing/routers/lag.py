"""LAG: Fleshman and Van Durme 2025, arXiv:2507.05346.

    K(x) = the filter_k adapters with the largest |p_e . x|      as Arrow scores them
    s_e(x) = ||D_e x|| for e in K(x)                             as SpectR scores them
    g(x) = softmax(s(x) / temperature) over the top_k largest of these

Arrow needs one product an adapter, so it filters a large library; SpectR ranks what is left.

Not checked against the paper beyond its abstract: filter_k and top_k of its experiments. A departure: A_e x of all
adapters is in memory here anyway, so the filter decides, but it saves little time.
"""

from typing import Literal

import torch
from torch import Tensor

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.model.routed import Experts, Gates
from graftlm.routing.base import RouterConfig, TokenRouter, among_top, softmax_of_top
from graftlm.routing.spectra import change_norms, top_directions, triangles


@config
class LagConfig(RouterConfig):
    name: Literal["lag"] = "lag"
    filter_k: PositiveCount = 20
    """Adapters that Arrow lets through."""
    top_k: PositiveCount | None = 1
    """Adapters among these that a token takes; null for all of them."""
    temperature: PositiveRate = 1.0


class Lag(TokenRouter):
    paper = "Fleshman and Van Durme 2025, arXiv:2507.05346"

    def gates(self, site: str, experts: Experts) -> Gates:
        p, R = top_directions(experts), triangles(experts)

        def found(x: Tensor, inner: Tensor) -> Tensor:
            passed = among_top((x @ p.T).abs(), self.config.filter_k)
            scores = torch.where(passed, change_norms(R, inner), -torch.inf)
            return softmax_of_top(scores, self.config.top_k, self.config.temperature)

        return found
