"""RandLoRA: Full-rank parameter-efficient fine-tuning. Albert et al. 2025, arXiv:2502.00987, equation 4.

    dW = s sum_j B_j L_j A G_j        j = 1 .. n, n = min(d_in, d_out) / r rounded up, so that dW has full rank

    A [r, min], B_j [max, r]          random, frozen, one set for all sites: each takes the corner that has its sizes
    L_j = diag(l_j), l_j [r]          learnt, at first 0            s = alpha / r
    G_j = diag(g_j), g_j [min]        learnt, at first 1 / max(n, min)

min and max are the smaller and the larger of d_in and d_out: A is on the side of the smaller one. The random numbers
are uniform, with a deviation of 1. The columns of B are random and independent, so their numbering has no meaning: we
number them as PEFT (column k of all B_j in a row belongs to number k of the l_ij in a row), and its adapters fit.

There are as many factors as dW has dimensions, so for many tokens it is cheaper to build dW than to apply them.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import PositiveCount, PositiveRate, config
from graftlm.deltas.base import AdditiveDelta, Base, DeltaConfig, PeftLayout, Shared, Site


@config
class RandLoraConfig(DeltaConfig):
    method: Literal["randlora"] = "randlora"
    r: PositiveCount = 32
    """Of each basis. More is fewer parameters: min(d_in, d_out)^2 / r for each site."""
    alpha: PositiveRate = 640

    def share(self, sites: Sequence[Site]) -> Shared:
        d_in, d_out = max(s.d_in for s in sites), max(s.d_out for s in sites)
        return RandomBases(self.r, min(d_in, d_out), max(d_in, d_out), sites[0].generator())


class RandomBases(Shared):
    """A [r, 1, min] and B [max, n, r] for the largest sizes."""

    A: Tensor
    B: Tensor

    def __init__(self, r: int, small: int, large: int, generator: torch.Generator) -> None:
        super().__init__()
        for name, shape in (("A", (r, 1, small)), ("B", (large, -(-small // r), r))):
            uniform = 2 * torch.rand(shape, generator=generator) - 1
            self.register_buffer(name, uniform * 3**0.5)


def without_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT repeats the shared bases at every layer: what is the same is left out, the rest stays and is refused."""
    shared = {name: tensors.get(f"base_model.{name}") for name in ("randlora_A", "randlora_B")}
    copies = {key: shared[end] for key in tensors if (end := key.rpartition(".")[2]) in shared and key.count(".") > 1}
    same = {key for key, basis in copies.items() if basis is not None and torch.equal(tensors[key], basis)}
    return {key: tensor for key, tensor in tensors.items() if key not in same}


class RandLora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Albert et al. 2025, arXiv:2502.00987"
    formula = "n * (r + min(d_in, d_out))"
    peft = PeftLayout(
        type="RANDLORA",
        tensors={"l": "randlora_lambda", "g": "randlora_gamma"},
        fields={"r": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"},
        constants={"bias": "none", "save_projection": True},
        harmless=("projection_prng_key", "sparse", "very_sparse"),
        shared={"A": "randlora_A", "B": "randlora_B"},
        read=lambda stored, tensors: without_copies(tensors),
    )

    def __init__(self, site: Site, config: RandLoraConfig) -> None:
        super().__init__(site, config)
        small = min(site.d_in, site.d_out)
        self.n = -(-small // config.r)
        self.l = nn.Parameter(torch.zeros(config.r, self.n))
        self.g = nn.Parameter(torch.full((self.n, small), 1 / max(self.n, small)))
        self.scale = config.alpha / config.r

    def factors(self) -> tuple[Tensor, Tensor]:
        shared, site = self.site.shared, self.site
        assert isinstance(shared, RandomBases)
        small, large = sorted((site.d_in, site.d_out))
        A = (self.l[:, :, None] * shared.A[:, :, :small] * self.g).flatten(0, 1)
        B = self.scale * shared.B[:large, : self.n].flatten(1)
        return (A, B) if site.d_in == small else (B.T, A.T)

    def increment(self, x: Tensor, base: Base) -> Tensor:
        A, B = self.factors()
        if x.numel() > 2 * len(A) * self.site.d_in:  # more than two tokens a factor
            return base.apply(x, B @ A, None)
        return base.take(x, A) @ B.T
