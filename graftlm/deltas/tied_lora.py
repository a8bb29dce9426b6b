"""Tied-LoRA: Enhancing parameter efficiency of LoRA with Weight Tying. Renduchintala et al. 2023, arXiv:2311.09578, 2.

    h = W x + diag(v) B diag(u) A x        A [r, d_in]  B [d_out, r]  one pair for all sites of one shape
                                           u [r]  v [d_out]  of each site; at first 1

Everything that is trained is a choice (table 1): all four are TL6, the paper's best and the default; A and B alone are
TL5. There is no alpha: the paper sets it to r. Here the first of B, v, u, A that is trained starts at zero, so that
dW = 0, and A and B are else random (Kaiming-uniform). At an embedding the first of A, u, v, B does, and B ~ N(0, 1), as
LoRA's (`starts.py`).

The paper adapts one fused layer for queries, keys and values, so that it ties over the depth of the model alone. We tie
all sites of one shape: in a model with separate projections, queries and outputs of attention share a pair too.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from graftlm.config.schema import Flag, PositiveCount, config
from graftlm.deltas.base import AdditiveDelta, DeltaConfig, Shared, Site


@config
class TiedLoraConfig(DeltaConfig):
    method: Literal["tied-lora"] = "tied-lora"
    r: PositiveCount = 16
    train_A: Flag = True
    train_B: Flag = True
    train_u: Flag = True
    train_v: Flag = True

    def __post_init__(self) -> None:
        if not (self.train_A or self.train_B or self.train_u or self.train_v):
            raise ValueError("none of A, B, u, v is trained: set train_A, train_B, train_u or train_v")

    def zero(self, kind: str) -> str:
        """The tensor that starts at zero at this kind of site."""
        order = "AuvB" if kind == "embedding" else "BvuA"
        return next(name for name in order if getattr(self, f"train_{name}"))

    def share(self, sites: Sequence[Site]) -> Shared:
        return Pairs(self, {(s.d_in, s.d_out): s.kind for s in sites}, sites[0].generator())


class Pairs(Shared):
    """A and B for each shape, by names such as A_576x1536: d_in, then d_out."""

    def __init__(self, config: TiedLoraConfig, kinds: Mapping[tuple[int, int], str], draw: torch.Generator) -> None:
        super().__init__()
        for (d_in, d_out), kind in sorted(kinds.items()):
            for name, shape in (("A", (config.r, d_in)), ("B", (d_out, config.r))):
                if kind == "embedding":
                    fresh = torch.randn(shape, generator=draw)
                else:
                    fresh = (2 * torch.rand(shape, generator=draw) - 1) / shape[1] ** 0.5
                _keep(self, config, kind, name, fresh, f"{name}_{d_in}x{d_out}")


def _keep(module: nn.Module, config: TiedLoraConfig, kind: str, name: str, fresh: Tensor, key: str) -> None:
    """Give the module a tensor that is trained or frozen, at its start."""
    fresh = torch.zeros_like(fresh) if config.zero(kind) == name else fresh
    if getattr(config, f"train_{name}"):
        module.register_parameter(key, nn.Parameter(fresh))
    else:
        module.register_buffer(key, fresh, persistent=False)


class TiedLora(AdditiveDelta):
    family = "reparameterisation"
    paper = "Renduchintala et al. 2023, arXiv:2311.09578"
    formula = "train_u * r + train_v * d_out"
    shared_formula = "sum(r * (train_A * d_in + train_B * d_out) for d_in, d_out in shapes)"
    learning_rate = 8e-3
    kinds = ("linear", "embedding")
    u: Tensor
    v: Tensor

    def __init__(self, site: Site, config: TiedLoraConfig) -> None:
        super().__init__(site, config)
        _keep(self, config, site.kind, "u", torch.ones(config.r), "u")
        _keep(self, config, site.kind, "v", torch.ones(site.d_out), "v")

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = (getattr(self.site.shared, f"{name}_{self.site.d_in}x{self.site.d_out}") for name in "AB")
        return self.u[:, None] * A, self.v[:, None] * B
