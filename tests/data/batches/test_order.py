"""A curriculum: every epoch holds every row once, in the order of its scores, and the seed decides all the rest."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graftlm.data.batches.order import Curriculum, curriculum
from graftlm.data.batches.pack import Example
from graftlm.data.sources.formats import Message
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.source import OrderConfig, Row
from tests.errors import raises

COUNT = 60
KEYS = np.random.default_rng(7).integers(0, 12, COUNT).astype(np.float64)  # many are alike


def epochs(config: OrderConfig, seed: int = 0, *, of: int = 3, size: int = 4) -> list[list[int]]:
    """The indices of each epoch."""
    plan = Curriculum(config, KEYS).batches(size, of * COUNT // size, seed)
    assert all(len(step) == size for step in plan)
    flat = [index for step in plan for index in step]
    return [flat[i * COUNT : (i + 1) * COUNT] for i in range(of)]


def test_every_epoch_holds_every_row_once_from_low_to_high() -> None:
    found = epochs(OrderConfig(by="x"))
    for epoch in found:
        assert sorted(epoch) == list(range(COUNT))
        assert (np.diff(KEYS[epoch]) >= 0).all()
    assert found[0] != found[1], "rows that are alike are shuffled anew"


def test_highest_first_is_the_reverse() -> None:
    for epoch in epochs(OrderConfig(by="x", highest_first=True)):
        assert (np.diff(KEYS[epoch]) <= 0).all()


def test_parts_are_shuffled_within_and_stay_in_order_among_each_other() -> None:
    found = epochs(OrderConfig(by="x", parts=5))
    size = COUNT // 5
    for epoch in found:
        parts = [KEYS[epoch[i : i + size]] for i in range(0, COUNT, size)]
        assert all(a.max() <= b.min() for a, b in zip(parts, parts[1:], strict=False))
        assert sorted(epoch) == list(range(COUNT))
        assert any((np.diff(part) < 0).any() for part in parts)
    assert found[0] != found[1]
    assert sorted(KEYS[epochs(OrderConfig(by="x", parts=1))[0]]) == sorted(KEYS), "one part is a shuffled epoch"


@pytest.mark.parametrize("config", [OrderConfig(by="x"), OrderConfig(by="x", parts=3)])
def test_the_order_follows_from_the_seed_and_a_longer_run_begins_as_a_shorter_one(config: OrderConfig) -> None:
    assert epochs(config, 1) == epochs(config, 1)
    assert epochs(config, 1) != epochs(config, 2)
    assert epochs(config, 1, of=3)[:2] == epochs(config, 1, of=2)


def test_steps_run_across_the_ends_of_epochs() -> None:
    plan = Curriculum(OrderConfig(by="x"), KEYS).batches(7, 20, 0)
    flat = [index for step in plan for index in step]
    assert len(flat) == 140
    assert sorted(flat[:COUNT]) == sorted(flat[COUNT : 2 * COUNT]) == list(range(COUNT))


def rows(scores: list[float | None]) -> list[Row]:
    return [Row([Message("user", "q")], f"f:{i}", "g", score=score) for i, score in enumerate(scores)]


def example(where: str, length: int = 1) -> Example:
    return Example(np.zeros(length, np.int32), np.ones(length, np.float32), where)


def test_all_that_a_row_is_rendered_to_has_its_score() -> None:
    examples = [example("f:1"), example("f:1"), example("f:0", 9)]
    assert curriculum(OrderConfig(by="x"), rows([3.0, -1.5]), examples).keys.tolist() == [-1.5, -1.5, 3.0]
    assert curriculum(OrderConfig(by="length"), rows([None, None]), examples).keys.tolist() == [1, 1, 9]


def test_a_row_without_a_score_is_named() -> None:
    with raises("data/missing-score", match="f:1"):
        curriculum(OrderConfig(by="x"), rows([3.0, None]), [example("f:0")])
    with raises("data/missing-score", match="f:0"):
        curriculum(OrderConfig(by="selected"), rows([None]), [example("f:0")])


def test_the_score_stands_in_a_field_and_a_row_without_it_is_left_out_by_name(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = ['"hard": 2', '"hard": -0.5', '"hard": true', '"hard": "1e3"', '"hard": "much"', '"hrad": 1', '"hard": []']
    file.write_text("".join(f'{{"prompt": "{i}", "completion": "a", {line}}}\n' for i, line in enumerate(lines)))
    problems: list[object] = []
    found, _ = load_rows(str(file), problems=problems, score="hard")  # type: ignore[arg-type]
    assert [row.score for row in found] == [2, -0.5, 1000]
    notes = [str(problem) for problem in problems]
    assert [line.split(": ")[0] for line in notes] == [f"{file}:{n}" for n in (3, 5, 6, 7)]
    assert "Did you mean 'hrad'" in notes[2]
    assert all(row.score is None for row in load_rows(str(file))[0]), "nobody asked for it"
    assert replace(found[0], score=None) == load_rows(str(file))[0][0]
