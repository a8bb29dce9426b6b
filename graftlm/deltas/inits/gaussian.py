"""A from a Gaussian, as the paper of LoRA says. Hu et al. 2021, arXiv:2106.09685, section 4.1.

    A [r, d_in] ~ N(0, 1 / r^2)

B stays as the method starts it: at zero, wherever it is trained. At an embedding LoRA's A = 0 and B ~ N(0, 1) stay.
The paper gives no variance; this is PEFT's (`init_lora_weights="gaussian"`), a standard deviation of 1 / r.
"""

import torch
from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import is_lora_at_embedding, rank


def gaussian(site: Site, part: Delta) -> dict[str, Tensor]:
    if is_lora_at_embedding(site, part):
        return {}
    r = rank(part)
    return {"A": torch.randn(r, site.d_in, generator=site.generator()) / r}
