"""Any format to messages: nothing is lost, nothing is overwritten, and reading the result gives the same rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftlm.data.sources.convert import convert
from graftlm.data.sources.formats import FORMATS
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.source import Row
from tests.data.sources.test_damage import CLEAN
from tests.data.sources.test_formats import ROWS
from tests.errors import raises


def written(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def content(rows: list[Row]) -> list[Row]:
    return [replace(row, where="") for row in rows]


@pytest.mark.parametrize("case", ROWS)
def test_every_format_comes_back_as_the_same_rows(case: str, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", ROWS[case][1], ROWS[case][1] | {"group": "g"})
    before, _ = load_rows(source)
    count, problems = convert(source, tmp_path / "out.jsonl")
    assert (count, [p for p in problems if p.left_out]) == (2, [])
    after, name = load_rows(str(tmp_path / "out.jsonl"))
    assert content(after) == content(before)
    roles = [message.role for message in before[0].messages]
    assert name == ("text" if "text" in roles else "messages" if "assistant" in roles else "prompt")
    convert(str(tmp_path / "out.jsonl"), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_of_every_format_come_back(name: str, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", *(CLEAN[name](n) for n in range(200)))
    convert(source, tmp_path / "out.jsonl")
    assert content(load_rows(str(tmp_path / "out.jsonl"))[0]) == content(load_rows(source)[0])


def test_the_result_is_what_openai_takes(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    source = written(tmp_path / "in.jsonl", {"conversations": turns, "tools": '[{"name": "f"}]'})
    convert(source, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }


def test_what_cannot_be_used_is_told_and_the_rest_is_written(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""})
    out = tmp_path / "out.jsonl"
    count, problems = convert(source, out)
    assert (count, [str(p).split(" ")[0] for p in problems]) == (1, [f"{source}:2:"])
    with raises("output/already-exists"):
        convert(source, out)
    convert(source, out, overwrite=True)
    out.unlink()
    with raises("data/unusable-rows", match="1 rows can be used, 1 cannot"):
        convert(source, out, strict=True)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"], "nothing is left of a conversion that failed"


def test_a_file_without_a_usable_row_is_an_error(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", {"prompt": "q", "completion": ""})
    with raises("data/unusable-rows", match="0 rows can be used, 1 cannot"):
        convert(source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
