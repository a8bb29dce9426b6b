"""Measuring the Intrinsic Dimension of Objective Landscapes. Li et al. 2018, arXiv:1804.08838, equation 2; on language
models Aghajanyan et al. 2020, arXiv:2012.13255, section 3.

    theta = theta_0 + P theta_d        theta_0 [D], all weights of all sites; theta_d [d], trained, at first 0
    dW[i, j] = c s[i] t[j] theta_d[(g[i] + h[j]) mod d]        c = sqrt(d / D)

One theta_d serves all sites. P [D, d] is random, sparse and never made: each row has a single entry, its column a hash
of the site, row and column of the weight, its sign a product of two random signs. g [d_out], h [d_in], s and t are made
again from the seed at every site. Each pair of columns of P is orthogonal, as no weight has two coordinates, and their
lengths are 1 up to the luck of the hash, so |P theta_d| = |theta_d| as in the papers, which take dense, sparse or
Fastfood matrices. dW is as full as W: a step costs as much as one of full fine-tuning. The second paper's own scale for
each layer (SAID) is left out.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Shared, Site


@config
class IntrinsicConfig(DeltaConfig):
    method: Literal["intrinsic"] = "intrinsic"
    dimension: PositiveCount = 4096
    """d: the number of trained parameters of the whole model."""

    def share(self, sites: Sequence[Site]) -> Shared:
        return Coordinates(self.dimension, sum(site.d_in * site.d_out for site in sites))


class Coordinates(Shared):
    def __init__(self, d: int, D: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(d))
        self.c = (d / D) ** 0.5


class Intrinsic(AdditiveDelta):
    family = "reparameterisation"
    paper = "Li et al. 2018, arXiv:1804.08838"
    formula = "0"
    shared_formula = "dimension"
    kinds = ("linear", "embedding")
    learning_rate = 0.32
    g: Tensor
    h: Tensor
    s: Tensor
    t: Tensor

    def __init__(self, site: Site, config: IntrinsicConfig) -> None:
        super().__init__(site, config)
        generator = site.generator()
        for name, size in (("g", site.d_out), ("h", site.d_in)):
            hashed = torch.randint(config.dimension, (size,), generator=generator)
            self.register_buffer(name, hashed, persistent=False)
        for name, size in (("s", site.d_out), ("t", site.d_in)):
            sign = 2.0 * torch.randint(2, (size,), generator=generator) - 1
            self.register_buffer(name, sign, persistent=False)

    def matrix(self) -> Tensor:
        shared = self.site.shared
        assert isinstance(shared, Coordinates)
        # Made again in the backward pass: its indices and signs for all sites would be larger than the model.
        W: Tensor = checkpoint(self._spread, shared.c * shared.theta, use_reentrant=False, preserve_rng_state=False)
        return W

    def _spread(self, theta: Tensor) -> Tensor:
        """c theta_d [d] -> dW."""
        places = (self.g[:, None] + self.h).flatten()  # less than 2 d: no remainder is needed
        spread = torch.cat([theta, theta]).index_select(0, places)
        return self.s[:, None] * self.t * spread.view(len(self.g), len(self.h))
