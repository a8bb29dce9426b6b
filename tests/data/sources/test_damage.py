"""Damage planted in a file: every damaged line is told, with what is wrong, and every other row is loaded."""

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from graftlm.data.sources.formats import FORMATS, RowError, check
from graftlm.data.sources.load import load_rows, stream_rows
from graftlm.data.sources.records import Problem
from graftlm.data.sources.source import SourceConfig
from graftlm.errors import DataError
from tests.data.damage import KINDS, NOTED, damaged_file, good
from tests.errors import raises

ROWS, DAMAGED = 20_000, 1_000


def line_of(problem: Problem) -> int:
    return int(problem.where.rpartition(":")[2])


def test_there_are_kinds_enough() -> None:
    assert len(KINDS) >= 28


def test_a_thousand_damaged_lines_are_all_told_in_one_pass_and_the_others_load(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    planted = damaged_file(file, ROWS, DAMAGED)
    problems: list[Problem] = []
    rows, name = load_rows(str(file), problems=problems)
    assert name == "messages"
    assert sorted(map(line_of, problems)) == sorted(planted)
    for problem in problems:
        kind = planted[line_of(problem)]
        assert str(problem).startswith(f"{file}:{line_of(problem)}: ")
        assert ({**KINDS, **NOTED})[kind][1] in problem.reason, f"{kind}: {problem.reason}"
        assert problem.left_out == (kind in KINDS), kind
    without_a_row = [n for n, kind in planted.items() if kind in KINDS or kind == "a blank line"]
    loaded = [int(row.where.rpartition(":")[2]) for row in rows]
    assert loaded == [n for n in range(1, ROWS + 1) if n not in set(without_a_row)]
    assert len(set(planted.values())) == len(KINDS) + len(NOTED)


def test_under_strict_the_same_file_is_refused_with_every_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    planted = damaged_file(file, 300, 100)
    for options in ({"strict": True, "problems": []}, {}):
        with raises("data/unusable-rows") as caught:
            load_rows(str(file), **options)  # type: ignore[arg-type]
        bad = sorted(n for n, kind in planted.items() if kind in KINDS)
        first, *lines = str(caught.value).split("\n")
        assert first.startswith(f"{len(bad)} rows of {file} cannot be used")
        assert [int(text.removeprefix(f"  {file}:").partition(":")[0]) for text in lines[:-1]] == bad[:20]


def pair(n: int) -> dict[str, Any]:
    return {"prompt": f"question {n}", "completion": f"answer {n}"}


CLEAN: dict[str, Any] = {
    "messages": good,
    "sharegpt": lambda n: {"conversations": [{"from": "human", "value": f"q {n}"}, {"from": "gpt", "value": "a"}]},
    "alpaca": lambda n: {
        "instruction": f"q {n}",
        "input": "i" * (n % 2),
        "output": "a",
        "history": [["b", "c"]] * (n % 3),
    },
    "prompt-completion": pair,
    "prompt": lambda n: {"prompt": f"question {n}", "system": "s"} if n % 2 else {"query": f"question {n}"},
    "text": lambda n: {"text": f"raw {n}\n"},
    "preference": lambda n: {"prompt": f"q {n}", "chosen": "a", "rejected": "b"},
    "feedback": lambda n: pair(n) | {"label": bool(n % 2)},
    "ranked": lambda n: {"prompt": f"q {n}", "responses": ["a", "b", "c"], "scores": [n, n + 1, 0.5]},
    "natural-instructions": lambda n: {"Definition": ["Do it."], "input": f"i {n}", "output": ["a", "b"], "id": n},
    "inputs-targets": lambda n: {"inputs": f"q {n}", "targets": "a"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_clean_rows_raise_no_alarm(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(CLEAN[name](n), ensure_ascii=False) + "\n" for n in range(1000)))
    for source in (SourceConfig(path=str(file)), SourceConfig(path=str(file), format=name)):  # type: ignore[arg-type]
        problems: list[Problem] = []
        rows, found = load_rows(source, problems=problems)
        assert (found, len(rows), problems) == (name, 1000, [])


ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1.5,
    1e400,
    "",
    "x",
    "\ud800",
    "user",
    [],
    {},
    [[]],
    [{}],
    ["x"],
    {"x": []},
    10**30,
)


def changed(value: Any, chance: random.Random) -> Any:
    """The same tree with something odd in one place: another value, a key less, an entry twice."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        other = value.copy()
        if chance.random() < 0.2:
            del other[key]
        elif isinstance(value, list) and chance.random() < 0.2:
            other.append(other[key])
        else:
            other[key] = changed(value[key], chance)
        return other
    return chance.choice(ODD)


@pytest.mark.parametrize("name", FORMATS)
def test_no_row_however_odd_is_more_than_a_row_that_cannot_be_used(name: str) -> None:
    chance = random.Random(name)
    refused = 0
    for n in range(3000):
        row = CLEAN[name](n)
        for _ in range(chance.randint(1, 3)):
            row = changed(row, chance)
        try:
            row_content = FORMATS[name](row if isinstance(row, dict) else {})
            for messages in (row_content.messages, *row_content.rejected):
                check(messages, asks=row_content.asks)
        except RowError:
            refused += 1
    assert 0 < refused < 3000


def test_no_bytes_are_more_than_rows_that_cannot_be_used(tmp_path: Path) -> None:
    chance = random.Random(0)
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        if name == "rows.csv":
            whole = b"prompt,completion\n" + b"".join(b'"q %d, \xc3\xa9",a\n' % n for n in range(20))
        else:
            rows = [json.dumps(good(n), ensure_ascii=False).encode() for n in range(20)]
            whole = b"\n".join(rows) if name == "rows.jsonl" else b"[" + b",\n".join(rows) + b"]"
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 5)):
                place = chance.randrange(len(damaged))
                damaged[place : place + chance.randint(0, 3)] = bytes(
                    chance.choices(b'{}[]",:\n\\\0\xff\xed\xa0', k=chance.randint(0, 3))
                )
            file = tmp_path / name
            file.write_bytes(damaged[: chance.choice([len(damaged), chance.randrange(1, len(damaged))])])
            with suppress(DataError):
                load_rows(str(file), problems=[])


def test_rows_come_one_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(pair(0)) + "\n" + "no JSON\n" * 1000)
    found = stream_rows(str(file))
    assert next(found) is not None
    one = next(found)
    assert isinstance(one, Problem)
    assert one.where == f"{file}:2"
