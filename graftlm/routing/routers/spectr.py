"""SpectR: Fleshman and Van Durme 2025, arXiv:2504.03454.

    s_e(x) = ||D_e x|| = ||S_e V_e^T x||        D_e = U_e S_e V_e^T
    g(x) = softmax(s(x) / temperature) over the top_k largest

Arrow sees one direction of an adapter, SpectR the whole spectrum. The paper stores the adapter anew as U_e and
S_e V_e^T. Here A_e x is computed anyway, and the norm of D_e x is that of R_e A_e x with B_e = Q_e R_e.

Not checked against the paper beyond its abstract and reviews: whether scores are normalized, and the temperature.
"""

from typing import Literal

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.model.routed import Experts, Gates
from graftlm.routing.base import RouterConfig, TokenRouter, softmax_of_top
from graftlm.routing.spectra import change_norms, triangles


@config
class SpectrConfig(RouterConfig):
    name: Literal["spectr"] = "spectr"
    top_k: PositiveCount | None = None
    """Adapters that a token takes; without it, all of them."""
    temperature: PositiveRate = 1.0


class Spectr(TokenRouter):
    paper = "Fleshman and Van Durme 2025, arXiv:2504.03454"

    def gates(self, site: str, experts: Experts) -> Gates:
        R = triangles(experts)
        return lambda _, inner: softmax_of_top(change_norms(R, inner), self.config.top_k, self.config.temperature)
