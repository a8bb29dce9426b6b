"""Rows that were read before are the same rows, found by what stands in the files and by nothing else."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftlm.data.chat import parallel, token_cache
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.preflight import prepare
from graftlm.data.sources import docstrings, mixing, row_cache
from graftlm.data.sources.mixing import Data, read_data
from graftlm.data.sources.parts import content_hash
from graftlm.data.sources.row_cache import CachedRows, read_cached
from graftlm.data.sources.source import DataConfig, SourceConfig
from graftlm.testing import tiny_tokenizer

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, 2.5, null]}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
LINES: list[dict[str, Any]] = [
    *({"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(8)),
    {"messages": [{"role": "user", "content": "\u00e9\U0001f600"}, {"role": "assistant", "content": "b", "weight": 1}]},
    {
        "messages": [
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "cd", "spans": [[0, 1, 0.0]], "reasoning_content": "hm"},
        ],
        "group": "mine",
    },
    {
        "messages": [
            {"role": "user", "content": "call"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
            {"role": "assistant", "content": "four"},
        ],
        "tools": [TOOL],
    },
    {"messages": [{"role": "user", "content": "like"}, {"role": "assistant", "content": "x"}], "desirable": True},
    {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
        "rejected": [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}]],
    },
]


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "MANY", 5_000)


def write(file: Path, lines: list[dict[str, Any]]) -> Path:
    """As messages, all of them: the format of a file is one."""
    rows = []
    for line in lines:
        if "prompt" in line:
            turns = zip(("user", "assistant"), (line["prompt"], line["completion"]), strict=True)
            line = {"messages": [{"role": role, "content": text} for role, text in turns]}
        rows.append(json.dumps(line) + "\n")
    file.write_text("".join(rows))
    return file


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    file = write(tmp_path / "rows.jsonl", LINES)
    with file.open("a") as out:
        out.write("nonsense\n\n")
    return file


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing is parsed."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the file was read")

    monkeypatch.setattr(mixing, "load_rows", never)


def same(a: Data, b: Data) -> bool:
    return (list(a.train), list(a.held_out), a.format, a.problems, a.notes) == (
        list(b.train), list(b.held_out), b.format, b.problems, b.notes
    )  # fmt: skip


def test_rows_of_every_kind_are_the_same_the_second_time(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(train=str(rows_file), held_out=3)
    plain = read_data(data, seed=1)
    folder = tmp_path / "kept"
    assert same(read_cached(data, seed=1, folder=folder), plain)
    unread(monkeypatch)
    again = read_cached(data, seed=1, folder=folder)
    assert isinstance(again.train, CachedRows)
    assert same(again, plain)
    assert [row.where for row in plain.train] == again.train.places
    assert again.train[-1] == plain.train[-1]
    assert again.train[2:5] == plain.train[2:5]
    with pytest.raises(IndexError):
        again.train[len(plain.train)]
    assert len(plain.problems) == 1


def test_only_rows_that_are_asked_for_are_made(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder, renderer = DataConfig(train=str(rows_file)), tmp_path / "kept", Renderer(tiny_tokenizer())
    first = prepare(read_cached(data, seed=1, folder=folder).train, renderer, data, cache=folder)
    assert not first[1].from_cache
    monkeypatch.setattr(parallel, "render", None)
    monkeypatch.setattr(row_cache, "_row", None)
    rows = read_cached(data, seed=1, folder=folder).train
    examples, report = prepare(rows, renderer, data, cache=folder)
    assert report.from_cache
    assert [(e.where, e.ids.tolist(), e.weights.tolist()) for e in examples] == [
        (e.where, e.ids.tolist(), e.weights.tolist()) for e in first[0]
    ]
    assert report.to_json() == first[1].to_json() | {"from_cache": True}


CHANGES: dict[str, Any] = {
    "a byte": lambda data, file: (data, 1, file.write_text(file.read_text().replace("answer 3", "answer 4"))),
    "the seed": lambda data, file: (data, 2, None),
    "how many are held out": lambda data, file: (replace(data, held_out=2), 1, None),
    "the weight": lambda data, file: (replace(data, train=(SourceConfig(path=str(file), weight=2.0),)), 1, None),
    "the cap": lambda data, file: (replace(data, train=(SourceConfig(path=str(file), cap=9),)), 1, None),
    "strict": lambda data, file: (replace(data, strict=True), 1, file.write_text(file.read_text()[:-10])),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_decides_on_rows_is_in_the_key(
    what: str, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = DataConfig(train=str(rows_file), held_out=3), tmp_path / "kept"
    read_cached(data, seed=1, folder=folder)
    changed, seed, _ = CHANGES[what](data, rows_file)
    assert same(read_cached(changed, seed=seed, folder=folder), read_data(changed, seed=seed))
    monkeypatch.setattr(token_cache, "code", lambda: "another version")
    unread(monkeypatch)
    with pytest.raises(AssertionError, match="was read"):
        read_cached(data, seed=1, folder=folder)


def test_neither_date_nor_mask_is_in_the_key_and_a_name_only_as_a_place(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = DataConfig(train=str(rows_file)), tmp_path / "kept"
    first = read_cached(data, seed=1, folder=folder).train
    moved = rows_file.rename(tmp_path / "other.jsonl")
    elsewhere = read_cached(DataConfig(train=str(moved)), seed=1, folder=folder).train
    assert elsewhere[0].where == f"{moved}:1"
    assert isinstance(first, CachedRows)
    assert isinstance(elsewhere, CachedRows)
    assert first.key == elsewhere.key, "what is rendered is the same"
    moved.rename(rows_file)
    os.utime(rows_file, (1, 1))
    unread(monkeypatch)
    assert read_cached(replace(data, prompt_weight=0.5, max_tokens=5), seed=1, folder=folder).train[0] == first[0]


def test_training_and_held_out_rows_have_keys_of_their_own(rows_file: Path, tmp_path: Path) -> None:
    found = read_cached(DataConfig(train=str(rows_file), held_out=3), seed=1, folder=tmp_path / "kept")
    assert isinstance(found.train, CachedRows)
    assert isinstance(found.held_out, CachedRows)
    assert found.train.key != found.held_out.key


def test_a_damaged_file_is_made_again_and_said(rows_file: Path, tmp_path: Path) -> None:
    data, folder = DataConfig(train=str(rows_file)), tmp_path / "kept"
    plain = read_data(data, seed=1)
    read_cached(data, seed=1, folder=folder)
    (file,) = folder.iterdir()
    raw = bytearray(file.read_bytes())
    raw[-40] ^= 1
    file.write_bytes(raw)
    again = read_cached(data, seed=1, folder=folder)
    assert list(again.train) == list(plain.train)
    assert "was damaged" in again.notes[0]
    assert same(read_cached(data, seed=1, folder=folder), plain), "and mended"


def test_the_built_in_rows_are_known_by_the_library_that_they_are_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, folder, data = tmp_path / "library", tmp_path / "kept", DataConfig(train="builtin:docstrings")
    (library / "test").mkdir(parents=True)
    monkeypatch.setattr(docstrings, "_root", lambda: library)
    monkeypatch.setattr(parallel, "MANY", 100)
    code = 'def {}(a, b):\n    """Adds what is given to it, twice."""\n    x = a + b  # a long, long line\n'
    body = "    y = a + b  # and another one\n    return x + y\n\n\n"
    (library / "a.py").write_text((code + body).format("one") + (code + body).format("two"))
    first = read_cached(data, seed=0, folder=folder)
    assert isinstance(first.train, CachedRows)
    assert list(first.train) == list(read_data(data, seed=0).train)
    (library / "test" / "c.py").write_text((code + body).format("four"))  # of which no row is made
    with monkeypatch.context() as now:
        unread(now)
        assert same(read_cached(data, seed=0, folder=folder), first)
    (library / "b.py").write_text((code + body).format("three"))
    assert len(read_cached(data, seed=0, folder=folder).train) == 3


def test_what_is_no_file_is_read_each_time_and_a_few_rows_too(rows_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    assert content_hash("hub:org/name") is None
    read_cached(DataConfig(train=str(write(tmp_path / "one.jsonl", LINES[:1]))), seed=0, folder=folder)
    read_cached(DataConfig(train=str(rows_file)), seed=0, folder=None)
    assert not folder.exists()


def test_rows_of_two_files_are_not_those_of_one(rows_file: Path, tmp_path: Path) -> None:
    """The same bytes in another partition."""
    folder = tmp_path / "kept"
    a, b = write(tmp_path / "a.jsonl", LINES[:5]), write(tmp_path / "b.jsonl", LINES[5:9])
    both = read_cached(DataConfig(train=(str(a), str(b))), seed=0, folder=folder)
    whole = read_cached(DataConfig(train=str(write(tmp_path / "c.jsonl", LINES[:9]))), seed=0, folder=folder)
    assert isinstance(both.train, CachedRows)
    assert isinstance(whole.train, CachedRows)
    assert both.train.key != whole.train.key
