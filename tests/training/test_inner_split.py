"""Rows put inner: never trained on, the same in every run, and what policies are told of them is their mean loss."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graftlm
from graftlm.data.batches.pack import collate
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.inner_split import inner_split, make_inner_loss
from graftlm.training.setup import Setup
from tests.callbacks.test_callbacks import training
from tests.errors import raises
from tests.training.test_loop import examples
from tests.training.test_preferences import written
from tests.training.test_resume import STEPS, recipe, rows, same, stopping_after

pytestmark = pytest.mark.usefixtures("without_pictures")

__all__ = ["rows"]

CASES: dict[str, Any] = {
    "bilora": {"delta": {"method": "adalora", "r": 4}, "callbacks": ["bilora"]},
    "autolora": {"delta": {"method": "gated-lora", "r": 4}, "callbacks": [{"name": "autolora", "search": 0.5}]},
    "alora": {
        "delta": {"method": "lora", "r": 3, "targets": ["q_proj"], "dropout": 0.1},
        "callbacks": [{"name": "alora", "first": 2, "moves": 1, "every": 2}],
    },
}


def split(made: Recipe, examples: list[Any]) -> tuple[list[Any], list[Any]]:
    return inner_split(examples, made.inner_share(), loss=made.loss, seed=made.train.seed)


def test_they_are_never_trained_on_and_follow_from_the_seed(base_folder: Path, rows: Path) -> None:
    rows_made = examples(40)
    training_rows, inner = split(recipe(base_folder, rows, **CASES["bilora"]), rows_made)
    assert len(inner) == 8
    assert sorted([id(e) for e in training_rows] + [id(e) for e in inner]) == sorted(map(id, rows_made))
    again = split(recipe(base_folder, rows, **CASES["bilora"]), rows_made)
    assert [e.where for e in again[1]] == [e.where for e in inner]
    other = split(recipe(base_folder, rows, train__seed=4, **CASES["bilora"]), rows_made)
    assert [e.where for e in other[1]] != [e.where for e in inner]
    assert split(recipe(base_folder, rows), rows_made) == (rows_made, [])
    with raises("training/too-few-rows", match="only 1 rows"):
        split(recipe(base_folder, rows, **CASES["bilora"]), rows_made[:1])


def test_the_inner_loss_is_the_mean_loss_of_the_next_rows(
    base_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, inner = recipe(base_folder, rows, **CASES["bilora"]), examples(6, seed=7)
    state = training(perturbed("adalora", tiny_model()), [])
    places: list[list[str]] = []

    def packs(self: Setup, chosen: Any) -> Any:
        places.append([e.where for e in chosen])
        return [collate(chosen[:2]), collate(chosen[2:])]

    monkeypatch.setattr(Setup, "make_packs", packs)
    loss = make_inner_loss(wanted.setup(), state, inner)
    state.done = 1  # rows 4 and 5, and the first two again
    value = loss(False)
    assert all(p.grad is None for p in state.parameters().values())
    assert torch.equal(loss(True), value)
    assert places == [[inner[i].where for i in (4, 5, 0, 1)]] * 2
    found = {name: p.grad for name, p in state.parameters().items()}
    pack = collate([inner[i] for i in (4, 5, 0, 1)])
    with packed_attention(state.model):
        mean = -(log_probs(state.model, pack) * pack.weights).sum() / pack.weights.sum()
    torch.testing.assert_close(value, mean.detach())
    for name, gradient in zip(found, torch.autograd.grad(mean, list(state.parameters().values())), strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_with_inner_rows_goes_on_to_the_same_bytes(
    case: str, base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(base_folder, rows, **CASES[case])
    graftlm.train(wanted, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        graftlm.train(wanted, tmp_path / "parts")
    graftlm.train(wanted, tmp_path / "parts", resume=True)
    same(tmp_path / "parts", tmp_path / "whole")
    events = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any("event" in line for line in events) is (case != "bilora")
    assert len([line for line in events if "loss" in line]) == STEPS


CHAINS: dict[str, Any] = {
    "cola": {"delta": {"method": "lora", "r": 2}, "callbacks": [{"name": "cola", "every": 2}]},
    "lte": {"delta": {"method": "lora", "r": 2}, "callbacks": [{"name": "lte", "every": 2, "heads": 2}]},
    "adalora": {
        "delta": {"method": "adalora", "r": 4},
        "callbacks": [{"name": "adalora", "target_r": 2, "every": 1}],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHAINS)
def test_a_run_whose_deltas_change_shape_goes_on_to_the_same_bytes(
    case: str, base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(base_folder, rows, **CHAINS[case])
    graftlm.train(wanted, tmp_path / "whole")
    for stop in (1, 4):
        out = tmp_path / f"parts-{stop}"
        with monkeypatch.context() as patch:
            stopping_after(stop, patch)
            graftlm.train(wanted, out)
        graftlm.train(wanted, out, resume=True)
        same(out, tmp_path / "whole")


def write_inner_rows(file: Path) -> Path:
    return written(file, [{"prompt": f"what is {n}?", "completion": f"{n} and {n}"} for n in range(5)])


def test_named_rows_take_the_place_of_a_share_of_the_training_rows(
    base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    file = write_inner_rows(tmp_path / "inner.jsonl")
    plain = recipe(base_folder, rows)
    made = recipe(base_folder, rows, data__inner_rows=str(file), **CASES["bilora"])
    data, wanted = (prepare_data(each, each.tokenizer()) for each in (made, plain))
    assert [e.where for e in data.examples] == [e.where for e in wanted.examples], "no training row is left out"
    assert [e.where.rpartition("/")[2] for e in data.inner_rows] == [f"inner.jsonl:{n}" for n in range(1, 6)]


def test_a_run_with_named_inner_rows_goes_on_to_the_same_bytes_and_knows_them(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_inner_rows(tmp_path / "inner.jsonl")
    made = recipe(base_folder, rows, data__inner_rows=str(file), **CASES["bilora"])
    graftlm.train(made, tmp_path / "whole")
    for name in ("out", "edited"):
        with monkeypatch.context() as patch:
            stopping_after(3, patch)
            graftlm.train(made, tmp_path / name)
    moved = file.rename(tmp_path / "moved.jsonl")
    same_rows = recipe(base_folder, rows, data__inner_rows=str(moved), **CASES["bilora"])
    graftlm.train(same_rows, tmp_path / "out", resume=True)
    same(tmp_path / "out", tmp_path / "whole")
    written(moved, [{"prompt": "what?", "completion": "that"}]).rename(file)
    with raises("training/dependencies-changed", match="rows of the inner validation split"):
        graftlm.train(made, tmp_path / "edited", resume=True)


def test_named_inner_rows_are_refused_where_nothing_learns_from_them(base_folder: Path, rows: Path) -> None:
    with raises("recipe/invalid-value", match="data.inner_rows: no callback .* bilora"):
        recipe(base_folder, rows, data__inner_rows=str(rows))


def test_a_loss_with_a_statistic_of_whole_steps_has_no_inner_rows(
    base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    judged = [{"prompt": f"say {n}", "completion": f"{n}", "label": n % 2 == 0} for n in range(8)]
    file = str(written(tmp_path / "judged.jsonl", judged))
    made = recipe(base_folder, rows, data__train=file, data__inner_rows=file, loss="kto", **CASES["bilora"])
    with raises("training/conflicting-settings", match="loss kto needs a statistic"):
        prepare_data(made, made.tokenizer())
