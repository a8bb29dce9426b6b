"""Clusters of a library: by what adapters do, whatever their factors; and by factors, as the authors have it."""

from pathlib import Path

import pytest
import torch

from graftlm.routing.clusters import clusters, k_means, similarities
from tests.errors import raises
from tests.routing.libraries import SITES, Library, in_another_gauge, pool_of, random_library


def families(noise: float = 0.3) -> Library:
    """Three families of adapters: each has the factors of its head, and noise."""
    found = {}
    for family in "xyz":
        head = random_library(family, seed=ord(family))[family]
        for member in range(4 if family == "x" else 3):
            random = torch.Generator().manual_seed(100 * ord(family) + member)
            found[f"{family}{member}"] = {
                site: tuple(t + noise * t.std() * torch.randn(t.shape, generator=random) for t in factors)
                for site, factors in head.items()
            }
    return found  # type: ignore[return-value]


def test_similarities_of_changes_are_cosines_of_dense_matrices() -> None:
    library = random_library("a", "b", "c", ranks=(2, 3))
    del library["b"][SITES[1]]  # type: ignore[attr-defined]
    dense = [
        torch.cat([(B.double() @ A.double()).flatten() for A, B in (f.get(s, (torch.zeros(1, a), torch.zeros(b, 1)))
        for s, (a, b) in {s: (A.shape[1], B.shape[0]) for s, (A, B) in library["a"].items()}.items())])
        for f in library.values()
    ]  # fmt: skip
    wanted = torch.stack([torch.stack([u @ v / u.norm() / v.norm() for v in dense]) for u in dense])
    assert torch.allclose(similarities(library), wanted, atol=1e-10)


def test_other_factors_of_the_same_adapters_are_the_same_changes_and_other_factors() -> None:
    library = families()
    other = in_another_gauge(library)
    assert torch.allclose(similarities(library), similarities(other), atol=1e-5)
    assert not torch.allclose(similarities(library, "factors"), similarities(other, "factors"), atol=0.1)


def test_similarities_of_factors_are_those_of_their_larger_halves() -> None:
    library = random_library("a", "b", "c")
    rows = []
    for factors in library.values():
        flat = torch.cat([torch.cat([A.flatten(), B.flatten()]) for _, (A, B) in sorted(factors.items())]).double()
        kept = flat.abs().argsort(descending=True)[: len(flat) // 2]
        rows.append(torch.zeros_like(flat).scatter(0, kept, flat[kept]))
    wanted = torch.nn.functional.cosine_similarity(torch.stack(rows)[:, None], torch.stack(rows)[None], dim=2)
    assert torch.allclose(similarities(library, "factors"), wanted, atol=1e-6), "three rows have no 65th direction"
    with raises("adapter/ranks-differ"):
        similarities(random_library("a", "b", ranks=(2, 3)), "factors")


@pytest.mark.parametrize("by", ["changes", pytest.param("factors", marks=pytest.mark.slow)])
def test_planted_families_are_found_in_any_order(tmp_path: Path, by: str) -> None:
    library = families()
    wanted = [[f"x{n}" for n in range(4)], [f"y{n}" for n in range(3)], [f"z{n}" for n in range(3)]]
    assert clusters(pool_of(library, tmp_path), 3, by=by) == wanted  # type: ignore[arg-type]
    assert clusters(pool_of(dict(reversed(library.items())), tmp_path), 3, by=by) == wanted  # type: ignore[arg-type]
    if by == "changes":
        assert clusters(pool_of(in_another_gauge(library), tmp_path / "gauge"), 3) == wanted
        some = clusters(pool_of(library, tmp_path), 2, names=("x0", "z1", "x2"))
        assert some == [["x0", "x2"], ["z1"]]
        with raises("recipe/unusable-settings", "1 to 10"):
            clusters(pool_of(library, tmp_path), 11)


def test_k_means_ends_in_the_means_of_its_clusters() -> None:
    torch.manual_seed(0)
    points = torch.cat([torch.randn(20, 3) + 6 * torch.randn(3) for _ in range(4)]).double()
    labels = k_means(points, 4, 0)
    centers = torch.stack([points[labels == each].mean(0) for each in range(4)])
    assert torch.equal(torch.cdist(points, centers).argmin(1), labels)
    assert torch.equal(k_means(torch.ones(5, 2).double(), 3, 0), torch.zeros(5, dtype=torch.long)), "all alike"
