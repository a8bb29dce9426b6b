"""SpIEL: Scaling Sparse Fine-Tuning to Large Language Models. Ansell et al. 2024, arXiv:2401.16405, section 3.

    W'[eta_i] = W[eta_i] + phi_i        eta [k] indices into W, all different; phi [k] learnt, at first 0

Here is one state of the method: the indices and what is added there. The paper moves the indices during training (drop
those with the smallest change, grow where the gradient is large): that is the callback `spiel`, which writes new
numbers into `eta` and zeros into `phi`. Without it this is sparse fine-tuning with fixed indices.

Fresh indices are random, one in each of k equal stretches of W (the paper: uniform, without replacement); where the
gradient of the loss is known, the k weights with the greatest.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Share, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Site


@config
class SpielConfig(DeltaConfig):
    method: Literal["spiel"] = "spiel"
    density: Share = 0.01
    """Share of the weights that learn, at least one of each layer."""


class Spiel(AdditiveDelta):
    family = "specification"
    paper = "Ansell et al. 2024, arXiv:2401.16405"
    callbacks = ("spiel",)
    formula = "max(1, int(density * d_in * d_out))"
    learning_rate = 8e-3
    kinds = ("linear", "embedding")
    eta: Tensor

    def __init__(self, site: Site, config: SpielConfig) -> None:
        super().__init__(site, config)
        k = max(1, int(config.density * site.d_in * site.d_out))
        stretch = site.d_in * site.d_out // k
        offsets = torch.randint(stretch, (k,), generator=site.generator())
        self.register_buffer("eta", torch.arange(k) * stretch + offsets)
        self.phi = nn.Parameter(torch.zeros(k))

    def start(self) -> None:
        if "gradient" in self.site.statistics:
            G = self.site.statistics["gradient"]
            self.eta.copy_(G.abs().flatten().topk(len(self.eta)).indices.sort().values)

    def matrix(self) -> Tensor:
        d_out, d_in = self.site.d_out, self.site.d_in
        return self.phi.new_zeros(d_out * d_in).index_copy(0, self.eta, self.phi).view(d_out, d_in)
