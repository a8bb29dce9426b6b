"""Low-rank changes of one layer of which every token takes a mixture of its own.

    y[t] = W x[t] + sum_e g_e(x[t]) B_e A_e x[t]        A_e [r_e, d_in], B_e [d_out, r_e] with its scale

What the g_e are is a router's business: it sees x and all A_e x, which are computed once for it and for the change.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Gates = Callable[[Tensor, Tensor], Tensor]
"""x [T, d_in] and all A_e x [T, n, r] -> g [T, n]; all in float32 at least."""


class Experts(NamedTuple):
    """The factors of n adapters at one layer, r the largest rank: behind the ranks of the others stand zeros."""

    names: tuple[str, ...]
    A: Tensor
    """[n, r, d_in]"""
    B: Tensor
    """[n, d_out, r]"""

    @classmethod
    def of(cls, factors: Mapping[str, tuple[Tensor, Tensor]]) -> "Experts":
        """Of adapter -> (A [r, d_in], B [d_out, r]), in float32 at least."""
        most = max(len(A) for A, _ in factors.values())
        A = torch.stack([pad(_wide(A), (0, 0, 0, most - len(A))) for A, _ in factors.values()])
        B = torch.stack([pad(_wide(B), (0, most - B.shape[1])) for _, B in factors.values()])
        return cls(tuple(factors), A, B)

    def to(self, device: torch.device) -> "Experts":
        return Experts(self.names, self.A.to(device), self.B.to(device))


class RoutedFactors:
    """The changes of one layer with what mixes them. It acts on the output of the layer, as other deltas do."""

    wants_y = True

    def __init__(self, experts: Experts, gates: Gates) -> None:
        self.experts, self.gates = experts, gates
        n, r, d_in = experts.A.shape
        self.A = experts.A.reshape(n * r, d_in)
        self.BT = experts.B.transpose(1, 2).reshape(n * r, -1)

    def __call__(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        """y with the change of each token of x [.. d_in], in the dtype of y."""
        with torch.autocast(x.device.type, enabled=False):  # as other factors, it is summed in float32
            rows = _wide(x.reshape(-1, x.shape[-1]))
            inner = (rows @ self.A.T).unflatten(1, self.experts.A.shape[:2])
            g = self.gates(rows, inner)
            change = (g[..., None] * inner).flatten(1) @ self.BT
        changed: Tensor = y + change.view(y.shape).to(y.dtype)
        return changed


def sites_of_all(adapters: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, Experts]:
    """Site -> its experts, of adapter -> site -> (A, B). An adapter that has no factors at a site is none there."""
    sites: Sequence[str] = list(dict.fromkeys(site for factors in adapters.values() for site in factors))
    return {site: Experts.of({name: own[site] for name, own in adapters.items() if site in own}) for site in sites}


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t
