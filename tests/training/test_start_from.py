"""`start_from`: a run continues an adapter, and what does not go on is refused before anything is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import graftlm
from graftlm.adapters.adapter import Adapter
from graftlm.adapters.folder import HEADS, RECORD, WEIGHTS
from graftlm.adapters.load import load_adapter
from graftlm.config.schema import build
from graftlm.hub.load import load_base
from graftlm.recipe import Recipe
from graftlm.testing.deltas import attach_tiny, logits, move
from graftlm.testing.tiny import save_tiny_base
from graftlm.training.objective import objective_heads
from graftlm.training.phases import attach_deltas
from tests.errors import raises
from tests.training.test_preferences import feedback
from tests.training.test_resume import same, stopping_after

pytestmark = pytest.mark.usefixtures("without_pictures")
__all__ = ["feedback"]


def recipe(base: Path, rows: Path, start: Path | None = None, delta: Any = None, **train: Any) -> Recipe:
    tree: dict[str, Any] = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "held_out": 4},
        "optimizer": "lomo",  # plain SGD, so that a run has no state but the adapter
        "train": {"steps": 3, "batch_rows": 20, "schedule": "constant", "warmup": 0, "learning_rate": 0.5, "seed": 3}
        | train,
        "report": {"samples": 1, "answers": 1, "max_new_tokens": 2},
    }
    tree |= {} if start is None else {"start_from": str(start)}
    tree |= {} if delta is None else {"delta": delta}
    return build(Recipe, tree, source="test")


@pytest.fixture
def first(base_folder: Path, rows: Path, tmp_path: Path) -> Path:
    return graftlm.train(recipe(base_folder, rows, delta={"method": "lora", "r": 4}), tmp_path / "first").folder


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_three_steps_and_three_more_of_sgd_are_six(base_folder: Path, rows: Path, first: Path, tmp_path: Path) -> None:
    """Every step has all rows, so that their order does not matter."""
    graftlm.train(recipe(base_folder, rows, first), tmp_path / "second")
    graftlm.train(recipe(base_folder, rows, delta={"method": "lora", "r": 4}, steps=6), tmp_path / "whole")
    losses = [line["loss"] for name in ("first", "second") for line in steps(tmp_path / name)]
    assert losses == pytest.approx([line["loss"] for line in steps(tmp_path / "whole")], rel=1e-5)
    found, wanted = (load_file(tmp_path / name / WEIGHTS) for name in ("second", "whole"))
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6)


def test_without_a_step_the_model_is_the_adapter(base_folder: Path, rows: Path, first: Path) -> None:
    model, other = (load_base(str(base_folder), dtype="float32").model for _ in range(2))
    attach_deltas(recipe(base_folder, rows, first).setup(), model, [], [])
    load_adapter(other, first)
    assert torch.equal(logits(model), logits(other))


def test_a_rate_that_moves_nothing_leaves_the_tensors(
    base_folder: Path, rows: Path, first: Path, tmp_path: Path
) -> None:
    graftlm.train(recipe(base_folder, rows, first, learning_rate=1e-30), tmp_path / "again")
    found, wanted = (load_file(folder / WEIGHTS) for folder in (tmp_path / "again", first))
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=0, atol=1e-20), key


def test_what_the_run_leaves_says_where_it_began(base_folder: Path, rows: Path, first: Path, tmp_path: Path) -> None:
    result = graftlm.train(recipe(base_folder, rows, first), tmp_path / "second")
    adapter, before = Adapter.read(tmp_path / "second"), Adapter.read(first)
    assert adapter.config == before.config
    assert adapter.recipe["start_from"] == str(first)
    assert adapter.recipe["delta"]["r"] == 4
    assert adapter.metrics == result.summary
    assert before.base is not None
    wanted = {"base_fingerprint": before.base["digest"], "held_out": before.metrics["held_out"]}
    assert result.summary["start_from"] == wanted


def test_frozen_tensors_are_those_of_the_adapters_seed(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    model = load_base(str(base_folder), dtype="float32").model
    move(attach_tiny("vera", model, seed=8))
    folder = graftlm.save_adapter(model, tmp_path / "vera")
    graftlm.train(recipe(base_folder, rows, folder, learning_rate=1e-30), tmp_path / "again")
    again = load_base(str(base_folder), dtype="float32").model
    load_adapter(again, tmp_path / "again")
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    assert json.loads((tmp_path / "again" / RECORD).read_text())["seed"] == 8


def test_a_stopped_run_goes_on_and_an_edited_start_is_noticed(
    base_folder: Path, rows: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(base_folder, rows, first, save_every=1)
    graftlm.train(made, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopping_after(2, patch)
        graftlm.train(made, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    moved = tmp_path / "moved"
    first.rename(moved)
    graftlm.train(recipe(base_folder, rows, moved, save_every=1), tmp_path / "out", resume=True)
    same(tmp_path / "out", tmp_path / "whole")
    graftlm.train(recipe(base_folder, rows, delta={"method": "lora", "r": 4}, steps=1), first)
    with raises("training/dependencies-changed", match="adapter in start_from"):
        graftlm.train(made, tmp_path / "other", resume=True)


def test_the_value_head_is_saved_and_continued(base_folder: Path, feedback: Path, tmp_path: Path) -> None:
    def made(start: Path | None) -> Recipe:
        tree = {
            "base": {"name": str(base_folder), "dtype": "float32"},
            "data": {"train": str(feedback), "held_out": 4},
            "loss": {"name": "dro", "value_rate": 0.1},
            "train": {"steps": 4, "batch_rows": 4, "learning_rate": 0.01},
            "report": {"samples": 1, "answers": 1, "max_new_tokens": 2},
        }
        return build(Recipe, tree | ({} if start is None else {"start_from": str(start)}), source="test")

    folder = graftlm.train(made(None), tmp_path / "first").folder
    stored = load_file(folder / HEADS)
    assert stored.keys() == {"value-head.weight", "value-head.bias"}
    assert all(tensor.any() for tensor in stored.values())
    assert HEADS in json.loads((folder / RECORD).read_text())["sha256"]
    model = load_base(str(base_folder), dtype="float32").model
    attach_deltas(made(folder).setup(), model, [], [])
    assert all(torch.equal(tensor, stored[key]) for key, tensor in objective_heads(model).items())
    graftlm.train(made(folder), tmp_path / "second")
    again = load_file(tmp_path / "second" / HEADS)
    assert any(not torch.equal(again[key], stored[key]) for key in stored)


def test_heads_that_this_loss_does_not_train_stay_with_the_adapter(
    base_folder: Path, rows: Path, first: Path, tmp_path: Path
) -> None:
    heads = {"value-head.weight": torch.ones(1, 32), "value-head.bias": torch.ones(1)}
    folder = Adapter(**{**vars(Adapter.read(first)), "heads": heads}).write(tmp_path / "with")
    graftlm.train(recipe(base_folder, rows, folder), tmp_path / "out")
    assert Adapter.read(tmp_path / "out").heads.keys() == heads.keys()


# What is refused -------------------------------------------------------------------------------------------------
def test_another_delta_is_refused_by_the_keys_that_differ(
    base_folder: Path, rows: Path, first: Path, tmp_path: Path
) -> None:
    other = {"method": "lora", "r": 8, "dropout": 0.1}
    with raises("recipe/other-delta") as raised:
        graftlm.train(recipe(base_folder, rows, first, delta=other), tmp_path / "out")
    assert "delta.r: 4 -> 8" in str(raised.value)
    assert "delta.dropout: 0.0 -> 0.1" in str(raised.value)
    assert not (tmp_path / "out").exists()
    same_one = recipe(base_folder, rows, first, delta={"method": "lora", "r": 4}, steps=1)
    graftlm.train(same_one, tmp_path / "out")


def test_a_folder_that_is_not_there_is_named_with_those_that_are(base_folder: Path, rows: Path, first: Path) -> None:
    with raises("adapter/no-such-folder", match="first"):
        recipe(base_folder, rows, first.with_name("fist"))


def test_several_deltas_continue_nothing(base_folder: Path, rows: Path, first: Path) -> None:
    tree = {"data": {"train": str(rows)}, "start_from": str(first), "deltas": {"a": {"method": "lora"}}}
    with raises("recipe/invalid-value", match="start_from continues one adapter"):
        build(Recipe, tree, source="test")


def test_another_tools_adapter_and_a_method_with_a_state_are_refused(
    base_folder: Path, rows: Path, first: Path, tmp_path: Path
) -> None:
    (first / RECORD).unlink()
    with raises("adapter/no-own-config", match="save_adapter"):
        recipe(base_folder, rows, first)
    model = load_base(str(base_folder), dtype="float32").model
    folder = graftlm.save_adapter(move(attach_tiny("adalora", model)), tmp_path / "adalora")
    with raises("adapter/not-continuable", match="adalora.*--resume"):
        recipe(base_folder, rows, folder)


def test_another_base_is_refused(rows: Path, first: Path, tmp_path: Path) -> None:
    other = save_tiny_base(tmp_path / "other", seed=5)
    with raises("base/other-base"):
        graftlm.train(recipe(other, rows, first), tmp_path / "out")


def test_the_recipe_that_a_run_leaves_repeats_it(base_folder: Path, rows: Path, first: Path, tmp_path: Path) -> None:
    graftlm.train(recipe(base_folder, rows, first), tmp_path / "a")
    written_down = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    assert written_down["start_from"] == str(first)
    graftlm.train(tmp_path / "a" / "recipe.yaml", tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
