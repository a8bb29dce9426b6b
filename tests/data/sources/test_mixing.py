"""Mixtures: shares are what the formula says, epochs are exact, and the seed is all that is drawn from."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from graftlm.data.sources.formats import Message
from graftlm.data.sources.mixing import apportion, balance, mix, read_data
from graftlm.data.sources.source import DataConfig, Row, SourceConfig
from graftlm.data.sources.splits import every_row
from tests.errors import raises


def rows(name: str, count: int) -> list[Row]:
    return [Row([Message("user", "q"), Message("assistant", f"{n}")], f"{name}:{n}", "q") for n in range(count)]


def source(**options: float | int) -> SourceConfig:
    return SourceConfig(path="x", **options)  # type: ignore[arg-type]


def count(mixed: list[Row]) -> dict[str, int]:
    return dict(Counter(row.where.split(":")[0] for row in mixed))


def test_with_nothing_said_an_epoch_is_every_row_once() -> None:
    parts = [rows("a", 7), rows("b", 13), rows("c", 1)]
    mixed, notes = mix(parts, [source()] * 3, temperature=1.0, seed=0)
    assert mixed == [row for part in parts for row in part]
    assert len(notes) == 3


@pytest.mark.parametrize(
    ("temperature", "weights", "wanted"),
    [
        (2.0, (1.0, 1.0), {"a": 40, "b": 360}),  # square roots of 4 and 324 are 2 and 18, a tenth and nine tenths
        (1e9, (1.0, 1.0), {"a": 200, "b": 200}),
        (1.0, (81.0, 1.0), {"a": 200, "b": 200}),
        (1e9, (3.0, 1.0), {"a": 300, "b": 100}),
    ],
)
def test_shares_follow_weight_and_temperature(
    temperature: float, weights: tuple[float, float], wanted: dict[str, int]
) -> None:
    """4 and 324 rows, and 72 of a third source that has no weight to speak of: an epoch has 400."""
    parts = [rows("a", 4), rows("b", 324), rows("c", 72)]
    sources = [source(weight=weight) for weight in (*weights, 1e-9)]
    assert count(mix(parts, sources, temperature=temperature, seed=0)[0]) == wanted


def test_every_row_of_a_source_comes_equally_often_but_for_one_more() -> None:
    mixed, notes = mix([rows("a", 7), rows("b", 93)], [source(weight=5.0), source()], temperature=1e9, seed=0)
    times = Counter(row.where for row in mixed)
    for name, size in (("a", 7), ("b", 93)):
        seen = [times[f"{name}:{n}"] for n in range(size)]
        assert max(seen) - min(seen) <= 1
    assert sum(times.values()) == 100
    assert "each comes 11 or 12 times" in notes[0]


def test_draws_do_not_depend_on_how_a_path_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        lines = [json.dumps({"prompt": f"q{n}", "completion": f"{n}", "desirable": n % 3 > 0}) for n in range(30)]
        Path(folder, f"{folder}.jsonl").write_text("\n".join(lines))

    def drawn(*paths: str, **options: float) -> list[str]:
        data = DataConfig(train=tuple(SourceConfig(path=path, cap=8) for path in paths), **options)  # type: ignore[arg-type]
        return [row.messages[-1].content for row in read_data(data, seed=3, usable=every_row).train]

    plain = drawn("a/a.jsonl")
    assert len(plain) == 8
    assert plain == drawn(str(tmp_path / "a" / "a.jsonl")) == drawn("./b/../a/a.jsonl") == drawn("b/b.jsonl")
    assert drawn("a/a.jsonl", "b/b.jsonl", mix_temperature=2) == drawn("b/b.jsonl", "./a/a.jsonl", mix_temperature=2)
    assert drawn("a/a.jsonl", "b/b.jsonl") != [*plain, *plain], "each source has a draw of its own"


def test_a_cap_draws_rows_that_follow_from_the_seed() -> None:
    parts = [rows("a", 100), rows("b", 10)]
    sources = [source(cap=10), source()]
    first, notes = mix(parts, sources, temperature=1.0, seed=0)
    assert count(first) == {"a": 10, "b": 10}
    assert "10 rows of an epoch, from 100, 10 of which are drawn; each comes 1 times" in notes[0]
    assert first == mix(parts, sources, temperature=1.0, seed=0)[0]
    assert first != mix(parts, sources, temperature=1.0, seed=1)[0]
    assert [row.where for row in first[:10]] == sorted((r.where for r in first[:10]), key=lambda w: int(w[2:]))


@pytest.mark.parametrize("total", [0, 1, 10, 997])
def test_what_is_apportioned_adds_up(total: int) -> None:
    for mass in ([1.0], [1.0, 1.0, 1.0], [0.1, 5.0, 0.0, 2.5]):
        counts = apportion(total, mass)
        assert sum(counts) == total
        assert all(abs(n - total * part / sum(mass)) < 1 for n, part in zip(counts, mass, strict=True))
    assert apportion(5, [0.0, 0.0]) == [0, 0]


def feedback(liked: int, disliked: int, silent: int = 0) -> list[Row]:
    flags = [True] * liked + [False] * disliked + [None] * silent
    return [replace(row, desirable=flag) for row, flag in zip(rows("f", len(flags)), flags, strict=True)]


@pytest.mark.parametrize("share", [0.5, 0.2, 0.8, 0.01])
def test_liked_rows_have_their_share_of_an_epoch_that_is_as_long_as_before(share: float) -> None:
    rows = feedback(30, 70, silent=5)
    found, note = balance(rows, share, seed=0)
    times = Counter(row.where for row in found)
    assert len(found) == 105
    kinds = Counter(row.desirable for row in found)
    assert (kinds[True], kinds[False], kinds[None]) == (round(100 * share), 100 - round(100 * share), 5)
    for flag in (True, False, None):
        seen = [times[row.where] for row in rows if row.desirable is flag]
        assert max(seen) - min(seen) <= 1
    assert "of an epoch, from 30 and 70" in note


def test_which_rows_come_once_more_follows_from_the_seed() -> None:
    rows = feedback(30, 70)
    assert balance(rows, 0.4, seed=1)[0] == balance(rows, 0.4, seed=1)[0]
    assert balance(rows, 0.4, seed=1)[0] != balance(rows, 0.4, seed=2)[0]


def test_a_ratio_needs_both_kinds(tmp_path: Path) -> None:
    with raises("data/single-label", match="0 as not liked"):
        balance(feedback(3, 0), 0.5, seed=0)
    file = tmp_path / "feedback.jsonl"
    lines = [{"prompt": f"{i}", "completion": "a", "label": i % 4 == 0} for i in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(train=str(file), desirable_share=0.5)
    found = read_data(data, seed=0, usable=lambda rows: (list(rows), []))
    assert Counter(row.desirable for row in found.train) == {True: 20, False: 20}
    with raises("data/single-label"):
        read_data(data, seed=0)
