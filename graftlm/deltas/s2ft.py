"""S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity. Yang et al. 2024,
arXiv:2412.06289, section 3.

    W'[:, c] = W[:, c] + V        V [d_out, k], at first 0; c: k of the d_in input channels
    dW = V S                      S [k, d_in]: row i is 1 at c_i and 0 elsewhere

Channels are chosen at random (S2FT-R, what the authors' code does) and trained where the authors train them: in the
output projection of attention (channels of a head belong together there: `run`) and in the second matrix of the
feed-forward block. Every layer gets as many; the authors draw from the channels of all layers together. The paper also
permutes the coupled matrices so that chosen channels lie side by side. That is for speed alone and is not done: here
they are picked by their indices.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, Base, DeltaConfig, Site, Targets
from graftlm.deltas.ia3 import INNER


@config
class S2ftConfig(DeltaConfig):
    method: Literal["s2ft"] = "s2ft"
    r: PositiveCount = 128
    """Input channels that learn in each layer."""
    run: PositiveCount = 1
    """Channels are chosen in runs of this many neighbours; the size of a head chooses whole heads."""
    targets: Targets = rf".*\.(o_proj|out_proj|dense|attn\.c_proj)|{INNER}"


class S2ft(AdditiveDelta):
    family = "specification"
    paper = "Yang et al. 2024, arXiv:2412.06289"
    formula = "max(1, min(r, d_in) // run) * run * d_out"
    learning_rate = 2e-3
    channels: Tensor

    def __init__(self, site: Site, config: S2ftConfig) -> None:
        super().__init__(site, config)
        runs = max(1, min(config.r, site.d_in) // config.run)
        run_numbers = torch.randperm(site.d_in // config.run, generator=site.generator())[:runs].sort().values
        channels = (run_numbers[:, None] * config.run + torch.arange(config.run)).flatten()
        self.register_buffer("channels", channels, persistent=False)
        self.V = nn.Parameter(torch.zeros(site.d_out, len(channels)))

    def factors(self) -> tuple[Tensor, Tensor]:
        return F.one_hot(self.channels, self.site.d_in).to(self.V), self.V

    def increment(self, x: Tensor, base: Base) -> Tensor:
        return F.linear(x.index_select(-1, self.channels), self.V)
