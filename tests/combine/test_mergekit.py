"""Against mergekit 0.1.5, whole matrices: tests/golden/make_mergekit.py."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from graftlm.combine.rules.model_stock import share_of_mean
from graftlm.testing.deltas import close
from tests.combine.sites import rule_of
from tests.golden.make_mergekit import CASES, PER_INPUT, SEED, changes

FILE = Path(__file__).parent.parent / "golden" / "mergekit.safetensors"
MADE = load_file(FILE)
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "task_arithmetic": ("linear", {}),
    "ties": ("ties", {"convention": "mergekit"}),
    "dare_linear": ("dare", {"convention": "mergekit"}),
    "dare_ties": ("dare", {"convention": "mergekit", "combine": "ties"}),
    "della": ("della", {"convention": "mergekit"}),
    "della_linear": ("della", {"convention": "mergekit", "combine": "sum"}),
    "breadcrumbs": ("breadcrumbs", {}),
    "sce": ("sce", {}),
    "model_stock": ("model-stock", {}),
    "karcher": ("karcher", {}),
    "slerp": ("slerp", {}),
}
"""mergekit's method -> our rule and its options."""


@pytest.mark.parametrize("case", CASES)
def test_in_its_convention_the_result_is_mergekits(case: str) -> None:
    method, weights, parameters = CASES[case]
    name, options = RULES[method]
    options = options | {key: parameters[key] for key in PER_INPUT if key in parameters}
    if method == "sce":
        options["density"] = parameters["select_topk"]
    given = changes()
    if method == "slerp":
        given, weights = given[:2], (1 - parameters["t"], parameters["t"])
    weights = [1 / 3] * 3 if weights is None else list(weights)
    found = rule_of(name, **options).merge(given, weights, torch.Generator().manual_seed(SEED))
    close(found, MADE[case], case)


def test_the_file_is_of_the_version_that_it_says_and_whole() -> None:
    with safe_open(FILE, "pt") as handle:
        assert handle.metadata()["mergekit"] == "0.1.5"
        assert set(handle.keys()) == set(CASES)


@pytest.mark.long(group="peers")
def test_the_file_comes_out_the_same_when_it_is_made_again(tmp_path: Path) -> None:
    command = ["make", "peers", "NAME=mergekit", f"GOLDEN={tmp_path}", f"PYTHON={sys.executable}"]
    subprocess.run(command, cwd=FILE.parent.parent.parent, check=True)
    made = load_file(tmp_path / FILE.name)
    assert made.keys() == MADE.keys()
    for case, tensor in made.items():
        close(tensor, MADE[case], case, 1e-6)


def test_where_we_differ_from_mergekit_on_purpose() -> None:
    given = changes()
    alone = rule_of("ties", "mergekit", density=1.0).merge(given[:1], [-1.0], torch.Generator())
    close(alone, given[0], "its weight -1 divides itself out")
    ours = rule_of("ties", density=1.0).merge(given[:1], [-1.0], torch.Generator())
    close(ours, -given[0], "ours is the opposite")
    cosines = torch.full((3, 3), -0.4, dtype=torch.float64).fill_diagonal_(1)
    opposed = list(torch.linalg.cholesky(cosines)[:, None])
    assert share_of_mean(opposed) == 0, "mergekit's t is -6 there"
