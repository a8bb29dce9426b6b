"""Rows of several templates in a run of several epochs: each epoch asks in another way, and all of it follows from the
seed."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graftlm
from graftlm.config.schema import build
from graftlm.data.batches.pack import batches
from graftlm.data.sources.prompt_templates import PromptTemplate, ask
from graftlm.data.sources.source import SourceConfig
from graftlm.data.sources.template_draws import Draws
from graftlm.prepare import Prepared, prepare_data
from graftlm.recipe import Recipe
from graftlm.testing import tiny_tokenizer
from graftlm.training.phases import make_batches
from tests.errors import raises
from tests.training.test_resume import losses, same, stopping_after

WORDS = ("Who", "What", "Which")
WAYS = tuple(PromptTemplate(prompt=f"{word} {{n}}?", completion="{n}") for word in WORDS)
ROWS = [{"n": f"n{n}"} for n in range(12)]


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def tree(base: Path, folder: Path, **train: Any) -> dict[str, Any]:
    ways = [{"prompt": way.prompt, "completion": way.completion} for way in WAYS]
    return {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": {"path": written(folder, "rows.jsonl", ROWS), "templates": ways}},
        "train": {"batch_rows": 4, "pack_tokens": 64, "seed": 5} | train,
    }


def prepared(recipe: dict[str, Any]) -> tuple[Recipe, Prepared]:
    made = build(Recipe, recipe, source="test")
    return made, prepare_data(made, tiny_tokenizer())


def prompts_by_epoch(made: Recipe, data: Prepared) -> list[list[str]]:
    """What each epoch asks, in the order of its steps."""
    plan = make_batches(made.train, data.examples, data.curriculum, data.draws)
    count = len(data.first_epoch)
    if data.curriculum is None and data.draws is not None:  # the largest step of a plan comes first, out of its epoch
        in_order = data.draws.of(batches(count, made.train.batch_rows, len(plan), made.train.seed))
        assert sorted(in_order) == sorted(plan)
        plan = in_order
    rows = [data.examples[number] for step in plan for number in step]
    texts = [
        data.renderer.tokenizer.decode(row.answers[0].ids).split("user\n")[1].split("<|im_end|>")[0] for row in rows
    ]
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def test_a_row_is_asked_in_every_way_once_before_one_comes_again() -> None:
    drawn = [[ask(WAYS, row, 5, epoch)[1] for epoch in range(7)] for row in ROWS]
    assert all(sorted(row[:3]) == [0, 1, 2] for row in drawn)
    assert all(row[3:] == row[:4] for row in drawn)
    assert len({tuple(row[:3]) for row in drawn}) > 3, "rows differ in their order"
    assert [ask(WAYS, row, 6)[1] for row in ROWS] != [row[0] for row in drawn], "another seed, another draw"
    for epoch in range(3):
        counts = Counter(ask(WAYS, {"n": n}, 0, epoch)[1] for n in range(3000))
        assert all(abs(count - 1000) < 130 for count in counts.values()), "five standard deviations of 1000 +- 26"
    short = PromptTemplate(prompt="{n} {m}", completion="{n}")
    assert {ask((*WAYS[:2], short), {"n": 1}, 5, epoch)[1] for epoch in range(4)} == {0, 1}, "one of them does not fit"


@pytest.mark.parametrize("order", [None, {"by": "length"}, {"by": "length", "parts": 3}])
def test_each_epoch_asks_every_row_in_another_way(
    order: dict[str, Any] | None, base_folder: Path, tmp_path: Path
) -> None:
    recipe = tree(base_folder, tmp_path, epochs=4)
    recipe["data"]["order"] = order
    plain = written(tmp_path, "plain.jsonl", [{"prompt": f"plain {n}?", "completion": "yes"} for n in range(6)])
    recipe["data"]["train"] = [recipe["data"]["train"], plain]
    made, data = prepared(recipe)
    assert len(data.first_epoch) == len(data.rows) == 18
    assert len(data.examples) == 3 * 12 + 6, "each rendering once"
    epochs = prompts_by_epoch(made, data)
    for number, texts in enumerate(epochs):
        ways = [ask(WAYS, row, 5, number)[1] for row in ROWS]
        wanted = [f"{WORDS[way]} {row['n']}?" for way, row in zip(ways, ROWS, strict=True)]
        assert sorted(texts) == sorted([*wanted, *(f"plain {n}?" for n in range(6))])
    assert sorted(epochs[3]) == sorted(epochs[0])
    assert prompts_by_epoch(*prepared(recipe)) == epochs
    assert any("24 more rows are rendered" in note for note in data.report.notes)
    assert data.report.rows == 18


def test_one_epoch_and_one_template_render_nothing_more(base_folder: Path, tmp_path: Path) -> None:
    _, data = prepared(tree(base_folder, tmp_path))
    assert (data.draws, len(data.examples)) == (None, 12)
    recipe = tree(base_folder, tmp_path, epochs=3)
    recipe["data"]["train"]["templates"] = recipe["data"]["train"]["templates"][:1]
    _, data = prepared(recipe)
    assert (data.draws, len(data.examples)) == (None, 12)


def test_a_row_that_comes_twice_in_an_epoch_is_asked_alike_both_times(base_folder: Path, tmp_path: Path) -> None:
    recipe = tree(base_folder, tmp_path, epochs=2)
    plain = written(tmp_path, "plain.jsonl", [{"prompt": f"plain {n}?", "completion": "yes"} for n in range(12)])
    recipe["data"]["train"] = [recipe["data"]["train"] | {"weight": 3.0}, plain]
    made, data = prepared(recipe)
    for texts in prompts_by_epoch(made, data):
        templated = Counter(text for text in texts if not text.startswith("plain"))
        assert len(templated) == 12, "one way of asking a row"
        assert set(templated.values()) <= {1, 2}


def test_many_short_epochs_go_round(base_folder: Path, tmp_path: Path) -> None:
    made, data = prepared(tree(base_folder, tmp_path, steps=60))
    assert len(data.examples) == 36
    epochs = prompts_by_epoch(made, data)
    assert len(epochs) == 20
    assert all(sorted(texts) == sorted(epochs[n % 3]) for n, texts in enumerate(epochs))


def test_a_rendering_that_is_too_long_leaves_its_epoch_with_the_first_one(base_folder: Path, tmp_path: Path) -> None:
    recipe = tree(base_folder, tmp_path, epochs=2)
    recipe["data"]["train"]["templates"][1]["prompt"] = "What {n}?" + " please" * 40
    long = [ask(build(SourceConfig, recipe["data"]["train"], source="t").templates, r, 5, 1)[1] == 1 for r in ROWS]
    short = [ask(build(SourceConfig, recipe["data"]["train"], source="t").templates, r, 5, 0)[1] != 1 for r in ROWS]
    recipe["data"] |= {"max_tokens": 64}
    made, data = prepared(recipe)
    missing = sum(a and b for a, b in zip(long, short, strict=True))
    assert missing > 0
    assert any(note.startswith(f"{missing} renderings for later epochs cannot be used") for note in data.report.notes)
    first, second = prompts_by_epoch(made, data)
    assert len(first) == len(second) == sum(short)
    assert not any("please" in text for text in (*first, *second))
    with raises("data/unusable-rows", match="are more than max_tokens"):
        prepared(recipe | {"data": recipe["data"] | {"over_length": "error"}})


def test_a_place_in_two_sources_is_asked_alike_and_that_is_noted(base_folder: Path, tmp_path: Path) -> None:
    recipe = tree(base_folder, tmp_path, epochs=2)
    recipe["data"]["train"] = [recipe["data"]["train"], recipe["data"]["train"]]
    made, data = prepared(recipe)
    assert any("12 rows stand in two sources" in note for note in data.report.notes)
    first, second = prompts_by_epoch(made, data)
    assert sorted(first) == sorted(second)


def test_plans_are_mapped_by_the_epoch_that_a_place_falls_in() -> None:
    draws = Draws(np.array([[0, 1, 2], [3, 1, 4]]), np.array([2, 1, 2]))
    plan = [[0, 1], [2, 2], [1, 0], [0, 2], [1, 0]]  # epochs of three rows: 0 1 2, 2 1 0, 0 2 1, 0
    assert draws.of(plan) == [[0, 1], [2, 4], [1, 3], [0, 2], [1, 3]]


@pytest.mark.slow
def test_a_run_that_stops_in_its_second_epoch_goes_on_to_the_same_bytes(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build(Recipe, tree(base_folder, tmp_path, epochs=3), source="test")
    graftlm.train(made, tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        stopping_after(4, patch)
        graftlm.train(made, tmp_path / "out")
    graftlm.train(made, tmp_path / "out", resume=True)
    same(tmp_path / "out", tmp_path / "unbroken")
    assert len(losses(tmp_path / "out")) == 9
