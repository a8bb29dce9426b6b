"""A stream of several sources has their shares at every moment, and goes on from a cursor exactly where it was."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from graftlm.data.chat import parallel
from graftlm.data.chat.render import Renderer
from graftlm.data.sources import streaming
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.mixing import read_data
from graftlm.data.sources.source import DataConfig, Row, SourceConfig
from graftlm.data.sources.streaming import Examples, Stream
from graftlm.testing import tiny_tokenizer
from tests.errors import raises

SIZES = {"a": 7, "b": 30, "c": 12}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 8)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    found = {}
    for name, size in SIZES.items():
        file = tmp_path / f"{name}.jsonl"
        lines = [{"prompt": f"{name} {n}", "completion": "yes " * (n % 5 + 1)} for n in range(size)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[name] = str(file)
    return found


def sources(files: dict[str, str], **options: dict[str, Any]) -> list[SourceConfig]:
    return [SourceConfig(path=path, **options.get(name, {})) for name, path in files.items()]


def names(rows: list[Row]) -> list[str]:
    return [row.messages[0].content for row in rows]


def test_an_epoch_is_that_of_a_mixture_and_every_row_comes_equally_often(files: dict[str, str]) -> None:
    configs = sources(files, a={"weight": 3.0}, b={"cap": 20})
    mixed = read_data(DataConfig(train=tuple(configs), mix_temperature=2.0), seed=5).train
    wanted = Counter(name.split()[0] for name in names(mixed))
    stream = Stream(configs, temperature=2.0, seed=5)
    assert stream.epoch == len(mixed)
    rows = names(list(islice(stream, 3 * stream.epoch)))
    for epoch in range(3):
        some = rows[epoch * stream.epoch : (epoch + 1) * stream.epoch]
        assert Counter(name.split()[0] for name in some) == wanted
    drawn = {name for name in rows if name[0] == "b"}
    assert len(drawn) == 20
    assert {name for name in names(mixed) if name[0] == "b"} <= drawn, "the cap draws the same rows"
    times = Counter(rows)
    for source in SIZES:
        seen = [count for name, count in times.items() if name.split()[0] == source]
        assert max(seen) - min(seen) <= 1


def test_shares_hold_at_every_moment(files: dict[str, str]) -> None:
    stream = Stream(sources(files, c={"weight": 4.0}), seed=0)
    taken = dict.fromkeys(SIZES, 0)
    for moment, row in enumerate(islice(stream, 2 * stream.epoch), start=1):
        taken[row.messages[0].content.split()[0]] += 1
        for (_, count), owed in zip(taken.items(), stream.owed, strict=True):
            assert abs(count - moment * owed / stream.epoch) < 1.5


def test_rows_are_shuffled_anew_in_every_pass_by_the_seed(files: dict[str, str]) -> None:
    one = [SourceConfig(path=files["b"])]
    first, second = (names(list(islice(Stream(one, seed=s), 60))) for s in (0, 1))
    assert first != second
    assert first == names(list(islice(Stream(one, seed=0), 60)))
    assert sorted(first[:30]) == sorted(first[30:]) == sorted(f"b {n}" for n in range(30))
    assert first[:30] != first[30:] != [f"b {n}" for n in range(30)]


def test_a_cursor_goes_on_exactly_from_any_row(files: dict[str, str]) -> None:
    configs = sources(files, a={"weight": 2.0}, b={"cap": 20})
    stream = Stream(configs, temperature=2.0, seed=3)
    whole = names(list(islice(stream, 150)))
    for at in range(0, 150, 7):
        cursor = json.loads(json.dumps(stream.cursor(at)))
        resumed = Stream(configs, temperature=2.0, seed=3, cursor=cursor)
        assert names(list(islice(resumed, 150 - at))) == whole[at:]
        twice = Stream(configs, temperature=2.0, seed=3, cursor=json.loads(json.dumps(resumed.cursor(5))))
        assert names(list(islice(twice, 20))) == names(list(islice(stream, at + 25)))[at + 5 :]


def test_a_cursor_that_does_not_fit_is_refused(files: dict[str, str]) -> None:
    configs = sources(files)
    cursor = Stream(configs, seed=0).cursor(4)
    with raises("data/cursor-mismatch", match="seed 0, this one has 1"):
        Stream(configs, seed=1, cursor=cursor)
    with raises("data/cursor-mismatch", match="sources"):
        Stream(configs[:2], seed=0, cursor=cursor)
    with raises("data/cursor-mismatch", match="weights"):
        Stream(configs, seed=0, temperature=4.0, cursor=cursor)
    with open(files["b"], "a") as file:
        file.write('{"prompt": "new", "completion": "row"}\n')
    with raises("data/file-changed", match=r"b\.jsonl"):
        Stream(configs, seed=0, cursor=cursor)


def test_a_file_that_changes_on_the_way_is_said(files: dict[str, str]) -> None:
    stream = iter(Stream([SourceConfig(path=files["b"])], seed=0))
    next(stream)
    Path(files["b"]).write_text("".join(Path(files["b"]).read_text().splitlines(keepends=True)[:20]))
    with raises("data/file-changed"):
        list(islice(stream, 100))


def test_no_more_than_a_block_of_a_source_is_read_ahead(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream([SourceConfig(path=files["b"])], seed=0)
    read = 0

    def counted(*args: Any, **options: Any) -> Iterator[Row]:
        nonlocal read
        for row in load_rows(files["b"])[0]:
            read += 1
            yield row

    monkeypatch.setattr(streaming, "stream_rows", counted)
    for count, _ in enumerate(islice(stream, 60), start=1):
        assert read <= count + streaming.BLOCK


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\nnonsense\n{"prompt": "a", "completion": ""}\n')
    stream = Stream([SourceConfig(path=str(file))])
    assert stream.left_out == 2
    assert [problem.split(": ")[0] for problem in stream.problems] == [f"{file}:2", f"{file}:3"]
    file.write_text("nonsense\n")
    with raises("data/unusable-rows"):
        Stream([SourceConfig(path=str(file))])


@pytest.mark.slow
def test_examples_go_on_exactly_from_any_of_them(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "CHUNK", 5 * parallel.ROW_COST)
    configs, renderer, data = sources(files), Renderer(tiny_tokenizer()), DataConfig(train="unused")

    def examples(cursor: Any = None) -> Examples:
        if cursor is None:
            return Examples(Stream(configs, seed=2), renderer, data, workers=1)
        return Examples(
            Stream(configs, seed=2, cursor=cursor["rows"]), renderer, data, workers=1, given=cursor["given"]
        )

    made = examples()
    whole, cursors = [], []
    for example in islice(made, 40):
        whole.append((example.where, example.ids.tolist()))
        cursors.append(json.loads(json.dumps(made.cursor())))
    assert len({cursor["rows"]["rows"] for cursor in cursors}) > 3, "several chunks were met"
    for at in range(0, 39, 3):
        rest = [(e.where, e.ids.tolist()) for e in islice(examples(cursors[at]), 39 - at)]
        assert rest == whole[at + 1 :]
        resumed = examples(cursors[at])
        next(iter(resumed))
        again = json.loads(json.dumps(resumed.cursor()))
        assert [(e.where, e.ids.tolist()) for e in islice(examples(again), 38 - at)] == whole[at + 2 :]
