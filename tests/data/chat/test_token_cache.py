"""Kept tokens are found again by the very same rows and means, and by nothing else."""

import datetime
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftlm.data.batches.pack import Example
from graftlm.data.chat import parallel, token_cache
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.token_columns import render
from graftlm.data.quality.preflight import prepare
from graftlm.data.sources.formats import Message
from graftlm.data.sources.source import DataConfig, Row
from graftlm.testing.tiny import CHATML, tiny_tokenizer
from tests.data.shapes import chat, tokenizer_for
from tests.errors import raises

DATA = DataConfig(train="rows.jsonl")
ROWS = [Row(chat(f"question {i}", f"answer {i}"), f"f:{i}", f"question {i}") for i in range(8)]
OTHER = CHATML.replace("\\n", "\\n\\n")


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rows are worth keeping, and rendered here."""
    monkeypatch.setattr(parallel, "MANY", 1_000)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer())


def same(a: list[Example], b: list[Example]) -> bool:
    return len(a) == len(b) and all(
        x.ids.tolist() == y.ids.tolist() and x.weights.tolist() == y.weights.tolist() and x.where == y.where
        for x, y in zip(a, b, strict=True)
    )


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_second_start_renders_nothing_and_gives_the_same(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, report = prepare(ROWS, renderer, DATA, cache=tmp_path)
    assert not report.from_cache
    assert len(files(tmp_path)) == 1
    monkeypatch.setattr(parallel, "render", None)  # would raise
    again, second = prepare(ROWS, renderer, DATA, cache=tmp_path)
    assert second.from_cache
    assert same(examples, again)
    assert second.to_json() == report.to_json() | {"from_cache": True}


def test_limits_of_length_are_applied_to_what_is_kept(renderer: Renderer, tmp_path: Path) -> None:
    length = len(prepare(ROWS, renderer, DATA, cache=tmp_path)[0][0])
    for changes in ({"max_tokens": length - 1, "over_length": "truncate"}, {"max_tokens": length}, {"pack": False}):
        data: Any = replace(DATA, **changes)
        examples, report = prepare(ROWS, renderer, data, cache=tmp_path)
        assert report.from_cache
        assert same(examples, prepare(ROWS, renderer, data)[0])
    assert len(files(tmp_path)) == 1


def test_a_changed_template_never_meets_old_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before, _ = prepare(ROWS, Renderer(tokenizer), DATA, cache=tmp_path)
    after, report = prepare(ROWS, Renderer(tokenizer, OTHER), DATA, cache=tmp_path)
    assert not report.from_cache
    assert not same(before, after)
    assert same(after, prepare(ROWS, Renderer(tokenizer, OTHER), DATA)[0])


CHANGES: dict[str, Any] = {
    "content": lambda row: replace(row, messages=[replace(row.messages[0], content="other"), *row.messages[1:]]),
    "role": lambda row: replace(row, messages=[replace(row.messages[0], role="system"), *row.messages[1:]]),
    "weight": lambda row: replace(row, messages=[*row.messages[:-1], replace(row.messages[-1], weight=0.5)]),
    "spans": lambda row: replace(row, messages=[*row.messages[:-1], replace(row.messages[-1], spans=((0, 1, 0.0),))]),
    "thinking": lambda row: replace(row, messages=[*row.messages[:-1], replace(row.messages[-1], thinking="hm")]),
    "tool calls": lambda row: replace(row, messages=[*row.messages[:-1], replace(row.messages[-1], tool_calls=({},))]),
    "tools": lambda row: replace(row, tools=({"type": "function"},)),
    "variables": lambda row: replace(row, variables={"enable_thinking": False}),
    "a message less": lambda row: replace(row, messages=row.messages[:1]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_any_change_of_a_row_is_another_key(renderer: Renderer, what: str) -> None:
    key = token_cache.key(ROWS, renderer, DATA)
    assert token_cache.key([*ROWS[:-1], CHANGES[what](ROWS[-1])], renderer, DATA) != key


def test_where_a_row_stands_and_its_group_are_not_in_the_key_and_the_order_is(renderer: Renderer) -> None:
    key = token_cache.key(ROWS, renderer, DATA)
    assert token_cache.key([replace(row, where="g:1", group="x") for row in ROWS], renderer, DATA) == key
    assert token_cache.key(ROWS[::-1], renderer, DATA) != key
    assert token_cache.key(ROWS[:-1], renderer, DATA) != key
    not_rendered = {"where", "group", "rejected", "desirable", "score", "unread", "template"}
    assert {f.name for f in fields(Row)} == {"messages", "tools", "variables"} | not_rendered, (
        "is the new field in the key?"
    )


def test_text_does_not_run_from_one_message_into_the_next(renderer: Renderer) -> None:
    one = Row([Message("user", "ab"), Message("assistant", "c")], "f", "")
    other = Row([Message("user", "a"), Message("assistant", "bc")], "f", "")
    assert token_cache.key([one], renderer, DATA) != token_cache.key([other], renderer, DATA)


def test_tokenizer_template_mask_and_code_are_in_the_key(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        token_cache.key(ROWS, renderer, DATA),
        token_cache.key(ROWS, Renderer(tiny_tokenizer(), OTHER), DATA),
        token_cache.key(ROWS, Renderer(tokenizer_for("llama-3"), CHATML), DATA),
        token_cache.key(ROWS, renderer, replace(DATA, mask="everything")),
    ]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})  # no other token, but another end
    keys.append(token_cache.key(ROWS, Renderer(tokenizer), DATA))
    monkeypatch.setattr(token_cache, "code", lambda: "another version")
    keys.append(token_cache.key(ROWS, renderer, DATA))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    assert token_cache.key(ROWS, Renderer(tiny_tokenizer()), DATA) == keys[0]


def test_a_template_that_writes_the_date_is_another_one_tomorrow() -> None:
    def keys(day: datetime.date) -> list[str]:
        templates = ("{{ strftime_now('%d') }}" + CHATML, CHATML)
        return [token_cache.key(ROWS, Renderer(tiny_tokenizer(), source, today=day), DATA) for source in templates]

    before, after = keys(datetime.date(2026, 12, 31)), keys(datetime.date(2027, 1, 1))
    assert (before[0] == after[0], before[1] == after[1]) == (False, True)


@pytest.mark.parametrize("harm", ["empty", "short", "flip", "header", "text"])
def test_a_damaged_file_is_rendered_anew_and_it_is_said(renderer: Renderer, tmp_path: Path, harm: str) -> None:
    wanted, _ = prepare(ROWS, renderer, DATA, cache=tmp_path)
    (file,) = files(tmp_path)
    raw = bytearray(file.read_bytes())
    if harm == "flip":
        raw[-3] ^= 1
    if harm == "header":
        raw[0] ^= 255
    file.write_bytes({"empty": b"", "short": raw[: len(raw) // 2], "text": b"not at all" * 30}.get(harm, raw))
    examples, report = prepare(ROWS, renderer, DATA, cache=tmp_path)
    assert same(wanted, examples)
    assert "damaged" in dict(report.lines())["noted"]
    assert prepare(ROWS, renderer, DATA, cache=tmp_path)[1].from_cache


def test_what_is_loaded_can_be_written_to_and_the_file_stays_as_it_is(renderer: Renderer, tmp_path: Path) -> None:
    columns = render(ROWS, renderer, DATA)
    token_cache.save(tmp_path / "a" / "f", columns)
    found = token_cache.load(tmp_path / "a" / "f")
    assert found is not None
    for name in ("ids", "roles", "weights", "ends", "rows", "control"):
        assert np.array_equal(getattr(found, name), getattr(columns, name))
        assert getattr(found, name).dtype == getattr(columns, name).dtype
    found.ids[:] = 0
    again = token_cache.load(tmp_path / "a" / "f")
    assert again is not None
    assert np.array_equal(again.ids, columns.ids)
    assert token_cache.load(tmp_path / "none") is None


def test_rows_that_cannot_be_rendered_are_the_same_problems_from_the_cache(tmp_path: Path) -> None:
    renderer = Renderer(tokenizer_for("gemma"))
    rows = [*ROWS, Row(chat("a", "b", system="s"), "f:9", "a")]
    messages = []
    for _ in range(2):
        with raises("data/unusable-rows") as caught:
            prepare(rows, renderer, replace(DATA, strict=True), cache=tmp_path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "f:9: the chat template refuses" in messages[0]


def test_a_folder_that_cannot_be_written_to_is_no_error(renderer: Renderer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    examples, _ = prepare(ROWS, renderer, DATA, cache=tmp_path / "file" / "rows")
    assert len(examples) == len(ROWS)


def test_few_rows_are_not_kept(renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "MANY", 1_000_000)
    prepare(ROWS, renderer, DATA, cache=tmp_path)
    assert files(tmp_path) == []


def test_the_folder_is_kept_small_and_what_was_used_last_stays(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = render(ROWS, renderer, DATA)
    token_cache.save(tmp_path / "a", columns)
    token_cache.save(tmp_path / "b", columns)
    for age, name in ((300, "b"), (200, "a")):
        stamp = (tmp_path / name).stat().st_mtime - age
        token_cache.os.utime(tmp_path / name, (stamp, stamp))
    monkeypatch.setattr(token_cache, "MOST_BYTES", 2 * (tmp_path / "a").stat().st_size)
    token_cache.save(tmp_path / "c", columns)
    assert [file.name for file in files(tmp_path)] == ["a", "c"]
