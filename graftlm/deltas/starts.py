"""How the factors of a product B A start, at a linear layer and at an embedding. No method.

    linear       A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0       Hu et al. 2021, arXiv:2106.09685, the authors' loralib
    embedding    A = 0, B ~ N(0, 1)                              loralib and PEFT

x is one-hot at an embedding: A x is one column of A, a sum over one input and not over d_in of them. So what is random
in A there is drawn as for one input, and where LoRA's A and B start, it is B that is random.
"""

import torch
from torch import Tensor

from graftlm.deltas.base import Site


def lora_factors(site: Site, r: int, draw: torch.Generator, *, columns: int | None = None) -> tuple[Tensor, Tensor]:
    """LoRA's fresh (A [r, d_in], B [d_out, r]); B has `columns` columns where they are not r."""
    columns = columns or r
    if site.kind == "embedding":
        return torch.zeros(r, site.d_in), torch.randn(site.d_out, columns, generator=draw)
    return uniform_A(site, r, draw), torch.zeros(site.d_out, columns)


def uniform_A(site: Site, r: int, draw: torch.Generator) -> Tensor:
    """A [r, d_in] ~ U(-1/sqrt(n), 1/sqrt(n)) with n = `fan_in`."""
    uniform: Tensor = (2 * torch.rand(r, site.d_in, generator=draw) - 1) / fan_in(site) ** 0.5
    return uniform


def fan_in(site: Site) -> int:
    """How many elements of x are summed up: all d_in of a linear layer, and the single 1 of a one-hot x."""
    return 1 if site.kind == "embedding" else site.d_in
