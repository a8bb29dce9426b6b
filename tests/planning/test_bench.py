"""The floor is what it says, and the parts of a step are told apart. Nothing here asks how fast anything is."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import graftlm.planning.bench as bench_module
from graftlm.cli import app
from graftlm.data.batches.pack import Example, collate
from graftlm.planning.bench import linear_shapes, one_pass, parts_of_time
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.passes import Passes

PARTS = {"matrix products", "attention", "head and loss", "element-wise", "rest"}


@pytest.mark.slow
def test_the_floor_is_four_flop_a_parameter_and_the_head_where_supervised(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "SQUARE", 64)
    monkeypatch.setattr(bench_module, "TOKENS", 256)
    monkeypatch.setattr(bench_module, "ROWS", 2)
    shown = CliRunner().invoke(app, ["bench", "--base", str(base_folder), "--threads", "1", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    linear = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    assert found["linear_parameters"] == linear
    needed = 4 * linear + found["supervised_share"] * 4 * 300 * 32
    assert found["mflop_per_token"] == pytest.approx(needed / 1e6, abs=0.1)
    assert found["floor_tokens_per_s"] == pytest.approx(found["matrix_gflops"] * 1e9 / needed, rel=0.05)
    assert found["share_of_floor"] == pytest.approx(found["tokens_per_s"] / found["floor_tokens_per_s"], abs=0.01)
    assert found["matrix_gflops"] == max(found["matrix_gflops_by_dtype"][found["dtype"]].values())
    assert found["parts"].keys() == PARTS


def test_linear_layers_are_counted_by_shape_under_deltas_too() -> None:
    wanted = {(32, 32): 4, (32, 16): 4, (32, 48): 4, (48, 32): 2}
    assert linear_shapes(tiny_model()) == wanted
    assert linear_shapes(perturbed("lora", tiny_model())) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_told_apart(dtype: torch.dtype) -> None:
    import numpy as np

    random = np.random.default_rng(0)
    rows = [
        Example(random.integers(3, 300, n).astype(np.int32), np.array([0.0] + [1.0] * (n - 1), np.float32), "row")
        for n in (40, 25)
    ]
    model = perturbed("lora", tiny_model().to(dtype))
    with Passes().through(model):
        parts = parts_of_time(lambda: one_pass(model, collate(rows)))
    assert parts.keys() == PARTS
    assert sum(parts.values()) == pytest.approx(1)
    assert all(share > 0 for share in parts.values())
    product = parts_of_time(lambda: torch.ones(300, 300) @ torch.ones(300, 300))
    assert product["attention"] == product["head and loss"] == 0
