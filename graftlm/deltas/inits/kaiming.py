"""A uniform by Kaiming's rule, as the authors' code of LoRA has it. Hu et al. 2021, arXiv:2106.09685; He et al. 2015,
arXiv:1502.01852.

    A [r, d_in] ~ U(-b, b)    b = sqrt(6 / ((1 + a^2) d_in)), a = sqrt(5): b = 1 / sqrt(d_in)

B stays as the method starts it: at zero, wherever it is trained. At an embedding LoRA's A = 0 and B ~ N(0, 1) stay.
LoRA and DoRA start like this by themselves; the init is for the methods that do not.
"""

from torch import Tensor

from graftlm.deltas.base import Delta, Site
from graftlm.deltas.inits._rank import is_lora_at_embedding, rank
from graftlm.deltas.starts import uniform_A


def kaiming(site: Site, part: Delta) -> dict[str, Tensor]:
    if is_lora_at_embedding(site, part):
        return {}
    return {"A": uniform_A(site, rank(part), site.generator())}
