"""Arrow: Ostapenko et al. 2024, arXiv:2405.11157, section 4.

    p_e = the right singular vector of D_e with the largest singular value      [d_in]
    s_e(x) = |p_e . x|
    g(x) = softmax(s(x) / temperature) over the top_k largest

p_e is the direction of unit length that the adapter changes most; its sign is arbitrary, hence the absolute value.
The authors' code has temperature 1 and all adapters, with neither x nor p normalized.

PEFT's ArrowConfig finds p_e by 15 steps of power iteration, which is far off where the second singular value is nearly
as large as the first. Ours is exact (`spectra.py`).
"""

from typing import Literal

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.model.routed import Experts, Gates
from graftlm.routing.base import RouterConfig, TokenRouter, softmax_of_top
from graftlm.routing.spectra import top_directions


@config
class ArrowConfig(RouterConfig):
    name: Literal["arrow"] = "arrow"
    top_k: PositiveCount | None = None
    """Adapters that a token takes; without it, all of them."""
    temperature: PositiveRate = 1.0


class Arrow(TokenRouter):
    paper = "Ostapenko et al. 2024, arXiv:2405.11157"

    def gates(self, site: str, experts: Experts) -> Gates:
        p = top_directions(experts)
        return lambda x, _: softmax_of_top((x @ p.T).abs(), self.config.top_k, self.config.temperature)
