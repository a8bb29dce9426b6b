"""The weighted sum cut to a rank or to a share of its energy. Eckart and Young 1936, Psychometrika 1(3).

    sum_i w_i M_i = P S Q^T        M = P_k S_k Q_k^T        ||M - sum_i w_i M_i|| = sqrt(sum_{j > k} S_j^2)

No matrix of rank k is nearer in the Frobenius norm. k is the rank of the composition, or the smallest one that keeps
`energy` = sum_{j <= k} S_j^2 / sum_j S_j^2. In core space the SVD is one of a small matrix, and the result is the same.
"""

from typing import Literal

from graftlm.combine.rules.base import Convention, RuleConfig
from graftlm.combine.rules.linear import Linear
from graftlm.config.schema import Share, config


@config
class SvdConfig(RuleConfig):
    name: Literal["svd"] = "svd"
    energy: Share | None = None
    """The share of the squared norm that is kept at each layer. Without it the composition needs a rank."""


class Svd(Linear):
    paper = "Eckart and Young 1936, Psychometrika 1(3)"

    def __init__(self, config: SvdConfig, convention: Convention | None = None) -> None:
        super().__init__(config, convention)
        self.energy = 1.0 if config.energy is None else config.energy
