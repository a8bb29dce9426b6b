"""What an adapter changes, layer by layer, and what two adapters have in common.

Of the change D [d_out, d_in] of a layer W, with singular values s_1 >= s_2 >= ...:

    size             ||D||_F, and as a share of ||W||_F
    spectral norm    s_1
    effective rank   exp(-sum p_i ln p_i), p_i = s_i / sum s (Roy and Vetterli 2007, "The effective rank")
    stable rank      ||D||_F^2 / s_1^2
    rank             singular values that are more than rounding

Of two changes D_1, D_2 of one layer:

    cosine           <D_1, D_2> / (||D_1||_F ||D_2||_F)
    overlap          phi = ||U_1^T U_2||_F^2 / min(r_1, r_2), from 0 to 1, of the left singular vectors U_i [d_out, r_i]
                     (Hu et al. 2021, arXiv:2106.09685, equation 4), and of the right ones likewise. It is the mean of
                     cos^2 over the principal angles, so it measures a distance on the Grassmannian

Random subspaces of dimension r of d dimensions have an overlap of max(r_1, r_2) / d on average: compare with that.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.adapters.adapter import Adapter
from graftlm.combine.changes import changes_of
from graftlm.combine.compose import check_one_base, loaded, read_adapters
from graftlm.combine.core import Change, numerical_rank
from graftlm.errors import AdapterError
from graftlm.model.bases import view

NAME = "graftlm-inspected"


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a change, without its zeros."""

    U: Tensor
    """[d_out, r]"""
    S: Tensor
    """[r], the largest first"""
    V: Tensor
    """[d_in, r]"""


@dataclass(frozen=True)
class SiteInspection:
    site: str
    norm: float
    relative: float
    """||D||_F / ||W||_F"""
    spectral_norm: float
    effective_rank: float
    stable_rank: float
    rank: int
    singular_values: list[float]


@dataclass(frozen=True)
class SiteOverlap:
    site: str
    cosine: float
    output: float
    """Overlap of the left singular vectors: what is written."""
    input: float
    """Overlap of the right ones: what is read."""
    output_by_chance: float
    input_by_chance: float


@dataclass(frozen=True)
class Inspection:
    adapters: list[str]
    sites: list[list[SiteInspection]]
    """Of each adapter, in the order of the model."""
    overlaps: list[SiteOverlap]
    """Of the layers that both change; empty for one adapter."""
    cosine: float | None
    """Of both changes as a whole; None for one adapter, and where one changes nothing."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers: what is not defined is None."""
        tree = asdict(self)
        for each in tree["overlaps"]:
            each.update({key: None for key, value in each.items() if value != value})
        return tree

    def moved_most(self, number: int, count: int) -> list[SiteInspection]:
        """The layers of an adapter whose change is largest as a share of the layer."""
        return sorted(self.sites[number], key=lambda each: -each.relative)[:count]


def inspect(model_or_base: nn.Module | str, adapters: Sequence[Adapter | str | Path]) -> Inspection:
    """One adapter, or two of one base. The model is left as it was.

    Raises AdapterError and BaseModelError for adapters that do not fit the base, TargetError for one that does more
    than change weight matrices.
    """
    members = read_adapters(adapters)
    if not 1 <= len(members) <= 2:
        raise AdapterError(f"{len(members)} adapters: inspect one, or compare two", code="one-or-two-adapters")
    check_one_base(members)
    model = loaded(model_or_base)
    spectra = [_spectra(model, member) for member in members]
    sites = [[_inspected(model, site, found) for site, found in each.items()] for each in spectra]
    names = [str(member.where) for member in members]
    if len(members) == 1:
        return Inspection(names, sites, [], None)
    one, other = spectra
    overlaps = [overlap(site, one[site], other[site]) for site in one if site in other]
    inner = sum(_inner(one[site], other[site]) for site in one if site in other)
    sizes = [sum(float(found.S.square().sum()) for found in each.values()) ** 0.5 for each in spectra]
    return Inspection(names, sites, overlaps, inner / (sizes[0] * sizes[1]) if all(sizes) else None)


@torch.no_grad()
def _spectra(model: nn.Module, adapter: Adapter) -> dict[str, Spectrum]:
    with changes_of(model, adapter, NAME, needs_rank=False) as changes:
        return {site: spectrum(make()) for site, make in changes.items()}


def spectrum(change: Change) -> Spectrum:
    """By the QR of both factors: D = s Q_B R_B R_A^T Q_A^T, and the SVD of what stands between."""
    Q_B, R_B = torch.linalg.qr(change.B.double())
    Q_A, R_A = torch.linalg.qr(change.A.double().T)
    P, S, Qh = torch.linalg.svd(change.scale * R_B @ R_A.T, full_matrices=False)
    r = numerical_rank(S) if float(S[0]) > 0 else 0
    return Spectrum(Q_B @ P[:, :r], S[:r], Q_A @ Qh[:r].T)


def effective_rank(S: Tensor) -> float:
    """0 for no change."""
    if not len(S):
        return 0.0
    p = S / S.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def overlap(site: str, one: Spectrum, other: Spectrum) -> SiteOverlap:
    """NaN where one of them changes nothing."""
    r, most = min(len(one.S), len(other.S)), max(len(one.S), len(other.S))
    nothing = r == 0
    sizes = float(one.S.norm() * other.S.norm())

    def shared(a: Tensor, b: Tensor) -> float:
        return float("nan") if nothing else float((a.T @ b).square().sum()) / r

    return SiteOverlap(
        site,
        float("nan") if nothing else _inner(one, other) / sizes,
        shared(one.U, other.U),
        shared(one.V, other.V),
        most / one.U.shape[0],
        most / one.V.shape[0],
    )


def _inner(one: Spectrum, other: Spectrum) -> float:
    """<D_1, D_2> = sum_ij s_i t_j (u_i . u'_j)(v_i . v'_j)"""
    return float((one.S[:, None] * other.S * (one.U.T @ other.U) * (one.V.T @ other.V)).sum())


def _inspected(model: nn.Module, site: str, found: Spectrum) -> SiteInspection:
    layer = view(_layer(model, site))
    assert layer is not None, "a change has a layer"
    S, own = found.S, layer.weight.double().norm()
    norm = float(S.norm()) if len(S) else 0.0
    largest = float(S[0]) if len(S) else 0.0
    return SiteInspection(
        site,
        norm,
        norm / float(own),
        largest,
        effective_rank(S),
        (norm / largest) ** 2 if largest else 0.0,
        len(S),
        [float(each) for each in S],
    )


def _layer(model: nn.Module, site: str) -> nn.Module:
    """The frozen layer, which a host may hold."""
    layer = model.get_submodule(site)
    base = getattr(layer, "base", None)
    return base if isinstance(base, nn.Module) else layer
