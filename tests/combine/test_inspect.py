"""What an adapter changes, against the SVD of W' - W, and what two have in common."""

import json
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.adapters.load import load_adapter
from graftlm.combine.core import Change
from graftlm.combine.inspect import SiteOverlap, effective_rank, inspect, overlap, spectrum
from graftlm.deltas.dora import DoraConfig
from graftlm.deltas.lora import LoraConfig
from graftlm.model.registry import hosts
from graftlm.testing import tiny_tokenizer
from tests.errors import raises
from tests.generation.adapters import base, write_adapter
from tests.test_cli import graft


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("inspect")
    base().save_pretrained(made / "base")
    tiny_tokenizer().save_pretrained(made / "base")
    write_adapter(made / "a", 1)
    write_adapter(made / "b", 2, LoraConfig(r=2, alpha=8))
    write_adapter(made / "d", 3, DoraConfig(r=2))
    return made


def changes(folder: Path) -> dict[str, torch.Tensor]:
    """W' - W of every layer."""
    model = base()
    before = {name: module.weight.detach().double().clone() for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear)}  # fmt: skip
    load_adapter(model, folder)
    return {site: host.effective()[0].detach().double() - before[site] for site, host in hosts(model).items()}


@pytest.mark.parametrize("name", ["a", "b", "d"])
def test_each_layer_has_the_singular_values_of_what_it_changed(name: str, folder: Path) -> None:
    found = inspect(base(), [folder / name])
    wanted = changes(folder / name)
    assert {each.site for each in found.sites[0]} == wanted.keys()
    assert wanted
    weights = {site: module.weight for site, module in base().named_modules() if isinstance(module, torch.nn.Linear)}
    for each in found.sites[0]:
        S = torch.linalg.svdvals(wanted[each.site])
        assert each.singular_values == pytest.approx(S[: each.rank].tolist(), rel=1e-4, abs=1e-4 * float(S[0]))
        assert each.norm == pytest.approx(float(wanted[each.site].norm()), rel=1e-5)
        assert each.spectral_norm == pytest.approx(float(S[0]), rel=1e-5)
        assert each.relative == pytest.approx(
            float(wanted[each.site].norm() / weights[each.site].double().norm()), rel=1e-5
        )
        assert each.stable_rank == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-4)
    if name != "d":
        assert {each.rank for each in found.sites[0]} == {4 if name == "a" else 2}
    most = found.moved_most(0, 3)
    assert [each.relative for each in most] == sorted((each.relative for each in found.sites[0]), reverse=True)[:3]


def test_cosines_are_those_of_the_changes(folder: Path) -> None:
    found = inspect(base(), [folder / "a", folder / "b"])
    one, other = changes(folder / "a"), changes(folder / "b")
    for each in found.overlaps:
        a, b = one[each.site], other[each.site]
        assert each.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-5)
    a, b = (torch.cat([each[site].flatten() for site in one]) for each in (one, other))
    assert found.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)
    assert {each.site for each in found.overlaps} == one.keys() & other.keys()


def test_an_adapter_has_everything_in_common_with_itself_and_with_its_opposite() -> None:
    draw = torch.Generator().manual_seed(0)
    B, A = torch.randn(12, 3, generator=draw), torch.randn(3, 9, generator=draw)
    R = torch.randn(3, 3, generator=draw)
    one, same = spectrum(Change(A, B, 2.0)), spectrum(Change(torch.linalg.inv(R) @ A, B @ R, -1.0))
    found = overlap("x", one, same)
    assert found == SiteOverlap("x", pytest.approx(-1), pytest.approx(1), pytest.approx(1), 3 / 12, 3 / 9)  # type: ignore[arg-type]
    # of subspaces that have one of two directions in common
    e = torch.eye(6)
    first, second = (spectrum(Change(e[:2], torch.stack([e[i], e[j]], 1))) for i, j in ((0, 1), (1, 2)))
    assert overlap("x", first, second).output == pytest.approx(0.5)
    assert overlap("x", first, second).input == pytest.approx(1)
    assert overlap("x", first, second).cosine == pytest.approx(0)


def test_the_overlap_of_random_subspaces_is_that_by_chance() -> None:
    draw, found = torch.Generator().manual_seed(1), []
    for _ in range(200):
        one, other = (
            spectrum(Change(torch.randn(r, 10, generator=draw), torch.randn(20, r, generator=draw))) for r in (2, 4)
        )
        found.append(overlap("x", one, other))
    for key in ("output", "input"):
        mean = sum(getattr(each, key) for each in found) / len(found)
        assert mean == pytest.approx(getattr(found[0], f"{key}_by_chance"), rel=0.1)
    assert sum(each.cosine for each in found) / len(found) == pytest.approx(0, abs=0.05)


def test_the_effective_rank_by_hand() -> None:
    assert effective_rank(torch.ones(4)) == pytest.approx(4)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(exp(-(0.75 * log(0.75) + 0.25 * log(0.25))))
    assert effective_rank(torch.ones(1)) == 1
    nothing = spectrum(Change(torch.randn(2, 5), torch.zeros(4, 2)))
    assert effective_rank(nothing.S) == 0
    assert overlap("x", nothing, nothing).cosine != overlap("x", nothing, nothing).cosine, "not defined"
    assert sqrt(float(nothing.S.square().sum())) == 0


def test_the_command_shows_layers_and_what_is_in_common(folder: Path) -> None:
    given = ("inspect", str(folder / "a"), str(folder / "b"), "--base", str(folder / "base"))
    shown = graft(*given, "--top", "2")
    assert shown.exit_code == 0
    for text in ("those that moved most", "effective rank", "by chance", "cosine of the whole"):
        assert text in shown.stdout
    found: Any = json.loads(graft(*given, "--json").stdout)
    assert len(found["sites"]) == 2
    assert found["overlaps"][0].keys() >= {"site", "cosine", "output", "input"}
    with raises("adapter/one-or-two-adapters"):
        inspect(base(), [folder / "a"] * 3)
