"""The LR range test: what it reads off a curve, that its noise is that of the steps, and that it leaves nothing."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from graftlm import cli, distributed
from graftlm.config.schema import build
from graftlm.data.batches.pack import lay_out
from graftlm.hub.load import load_base
from graftlm.model.registry import trainable
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.planning import lr_range
from graftlm.planning.lr_range import STEPS, Trial, lr_range_test, suggestion
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe
from graftlm.training.phases import attach_deltas, make_batches
from tests.errors import raises

RATES = [10 ** (-6 + 6 * i / (STEPS - 1)) for i in range(STEPS)]


def recipe(base: Path, rows: Path, **train: Any) -> Recipe:
    tree = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "held_out": 4},
        "delta": {"method": "lora", "r": 4},
        "train": {"steps": 4, "batch_rows": 4, "seed": 3, **train},
    }
    return build(Recipe, tree, source="test")


def curve(*points: tuple[float, float], noise: float = 0.0) -> list[Trial]:
    """Straight lines between (rate, gain) over the logarithm of the rate, on rows that differ by several nats."""
    generator = torch.Generator().manual_seed(0)
    trials = []
    for number, rate in enumerate(RATES):
        right = next((i for i, (x, _) in enumerate(points) if x >= rate), None)
        if right is None:
            break
        (x0, y0), (x1, y1) = points[max(0, right - 1)], points[right]
        share = 0.0 if x1 == x0 else torch.log(torch.tensor(rate / x0)) / torch.log(torch.tensor(x1 / x0))
        before = 2.0 + 5 * (number * 7 % 11) / 11
        wobble = noise * float(torch.randn(1, generator=generator))
        trials.append(Trial(rate, before + y0 + float(share) * (y1 - y0) + wobble, before))
    return trials


def test_the_suggestion_lies_below_where_the_loss_fell_most() -> None:
    found = suggestion(curve((1e-6, 0.0), (1e-4, 0.0), (1e-2, -1.0), (1e-1, 1.5), noise=0.02))
    assert found["best_rate"] == pytest.approx(1e-2, rel=0.3)
    assert found["learning_rate"] == pytest.approx(found["best_rate"] / lr_range.BELOW_BEST, rel=0.05)
    assert found["fell"] == pytest.approx(1.0, abs=0.1)
    assert found["diverged_rate"] == pytest.approx(10 ** (-2 + 1 / 2.5), rel=0.3)


def test_a_second_valley_behind_the_first_does_not_count() -> None:
    found = suggestion(curve((1e-6, 0.0), (1e-4, 0.0), (1e-3, -0.8), (1e-2, -0.1), (1, -1.0)))
    assert found["best_rate"] == pytest.approx(1e-3, rel=0.3)
    assert found["diverged_rate"] is None


def test_what_does_not_show_is_none_and_said_so(base_folder: Path, rows: Path) -> None:
    found = suggestion(curve((1e-6, 0.0), (1, 0.0)))
    assert (found["learning_rate"], found["best_rate"], found["diverged_rate"]) == (None, None, None)
    words = lr_range.lines(found | {"noise": None, "batch_rows": None}, recipe(base_folder, rows))
    assert "none that was tested made the loss fall" in words[0]
    assert len(suggestion(curve((1e-6, 0.0), (1e-5, 2.0)))) == 4, "an early end is an end too"


@pytest.mark.slow
def test_on_a_tiny_base_it_leaves_nothing_and_repeats_itself(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = lr_range_test(recipe(base_folder, rows))
    assert sorted(tmp_path.rglob("*")) == before
    assert [step["rate"] for step in found["steps"]] == pytest.approx(RATES[: len(found["steps"])])
    assert found["steps"][0]["loss"] == pytest.approx(found["steps"][0]["base_loss"]), "a fresh LoRA is its base"
    assert 1e-4 < found["learning_rate"] < 1e-1
    assert found["fell"] > 0.1
    assert lr_range_test(recipe(base_folder, rows)) == found
    json.dumps(found)


def test_a_loss_that_runs_away_ends_the_test(base_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lr_range, "HIGHEST", 1e6)
    tree = recipe(base_folder, rows)
    found = lr_range_test(replace(tree, delta=replace(tree.delta, targets=("lm_head", "down_proj"))))  # type: ignore[arg-type]
    assert len(found["steps"]) < STEPS
    assert found["diverged_rate"] is not None
    assert found["learning_rate"] < found["diverged_rate"]


def test_its_noise_is_that_of_the_gradients_of_the_steps(
    base_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_range, "HIGHEST", 1e-6)
    tree = recipe(base_folder, rows, clip=1e-3)
    found = lr_range_test(tree, count=12)["noise"]
    tree = replace(tree, train=replace(tree.train, steps=12))
    model, tokenizer = load_base(tree.base)
    examples = prepare_data(tree, tokenizer).examples
    plan = make_batches(tree.train, examples)
    attach_deltas(tree.setup(), model, examples, plan)
    gradients = []
    for batch in plan:
        packs = lay_out([examples[i] for i in batch], 1024, packed=True, share=False)
        with packed_attention(model):
            loss = -sum((log_probs(model, p) * p.weights).sum() for p in packs) / sum(p.weights.sum() for p in packs)
        made = torch.autograd.grad(loss, list(trainable(model).values()))
        gradients.append(torch.cat([g.flatten() for g in made]).double())
    each = torch.stack(gradients)
    variance = each.var(0).sum()  # of one step's gradient
    true = each.mean(0).square().sum() - variance / len(plan)
    assert (found["gradients"], found["rows"]) == (12, 48)
    assert found["noise_rows"] == pytest.approx(float(4 * variance / true), rel=1e-2)


def test_an_objective_that_compares_answers_is_tested_by_its_own_loss(base_folder: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"question {n}", "chosen": "yes it is", "rejected": f"no {n}"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tree = {
        "base": {"name": str(base_folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "pairs.jsonl")},
        "loss": "dpo",
        "train": {"batch_rows": 4},
    }
    found = lr_range_test(build(Recipe, tree, source="test"), count=40)
    assert found["steps"][0] == {"rate": 1e-6, "loss": pytest.approx(math.log(2)), "base_loss": 0.0}
    assert found["fell"] > 0.05


def test_several_deltas_are_tested_together_and_keep_their_ratio(base_folder: Path, rows: Path) -> None:
    tree = {
        "base": {"name": str(base_folder), "dtype": "float32"},
        "data": {"train": str(rows), "held_out": 4},
        "deltas": {"low": {"method": "lora", "r": 4}, "biases": {"method": "bitfit"}},
        "train": {"batch_rows": 4, "in_turn": True},
        "callbacks": ["lora-plus"],
    }
    assert len(lr_range_test(build(Recipe, tree, source="test"), count=20)["steps"]) == 20


def test_several_processes_are_refused(base_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with raises("training/one-process-only"):
        lr_range_test(recipe(base_folder, rows))


@pytest.mark.slow
def test_the_command_prints_and_draws(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(
        f"base: {{name: {base_folder}, dtype: float32}}\ndata: {{train: {rows}}}\ntrain: {{batch_rows: 4}}\n"
    )
    text = CliRunner().invoke(cli.app, ["lr-range", "recipe.yaml"])
    assert text.exit_code == 0, text.output
    assert "to begin with: the loss fell most" in text.stdout
    assert "<svg" in Path("lr-range.html").read_text()
    tree = CliRunner().invoke(cli.app, ["lr-range", "recipe.yaml", "--json", "--html", "rates.html"])
    assert json.loads(tree.stdout).keys() >= {"learning_rate", "best_rate", "diverged_rate", "noise", "batch_rows"}
    assert "<svg" in Path("rates.html").read_text()
    assert not Path("adapter").exists()
