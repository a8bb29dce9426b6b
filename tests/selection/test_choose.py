"""Scores are made once, how many are kept is moved freely, and the command line does it all from a file to a file."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import graftlm
from graftlm import cli
from graftlm.config.schema import build
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.load import load_rows
from graftlm.hub.tokenizer import load_tokenizer
from graftlm.prepare import prepare_data
from graftlm.recipe import Recipe
from graftlm.selection import SELECTORS, choose
from graftlm.selection.base import Pool
from graftlm.selection.ifd import IfdConfig
from graftlm.testing.tiny import CHATML, tiny_tokenizer
from tests.errors import raises
from tests.selection.conftest import some_rows

pytestmark = pytest.mark.usefixtures("without_pictures")

FOLDER = Path(graftlm.__file__).parent / "selection"
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "select-rows.md"


def select(*arguments: Any) -> Any:
    result = CliRunner().invoke(cli.app, ["data", "select", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_no_selector_is_missing_from_the_table() -> None:
    files = {p.stem for p in FOLDER.glob("*.py")} - {"__init__", "base", "choose"}
    assert files == {name.replace("-", "_") for name in SELECTORS}
    for name, selector in SELECTORS.items():
        assert selector.config.__dataclass_fields__["by"].default == name  # type: ignore[attr-defined]
        assert len((FOLDER / f"{name.replace('-', '_')}.py").read_text().splitlines()) <= 170
        assert f"`{name}`" in PAGE.read_text(), "the page says what it keeps"


@pytest.mark.parametrize(("keep", "count"), [(3, 3), (0.2, 2), (0.01, 1), (1.0, 10), (99, 10), (None, 10)])
def test_keep_is_a_count_or_a_share(keep: float | None, count: int) -> None:
    scores = np.array([5, 1, 5, 9, 2, 2, 2, 7, 0, -4], np.float32)
    indices = choose.best(scores, keep)
    assert len(indices) == count
    assert indices == sorted(indices), "in the order of the file"
    assert min(scores[indices]) >= max(np.delete(scores, indices), default=-np.inf)


def test_of_equal_scores_the_first_rows_stay_and_what_is_left_out_never_does() -> None:
    scores = np.array([1, 2, -np.inf, 2, 2], np.float32)
    assert choose.best(scores, 2) == [1, 3]
    assert choose.best(scores, 5) == [0, 1, 3, 4]


@pytest.mark.sampled
@pytest.mark.parametrize("by", sorted(SELECTORS))
def test_every_selector_works_from_the_command_line(
    by: str, base_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    settings = {
        "less": ["--target", rows_file, "epochs=1", "batch_rows=4", "r=2"],
        "rds": ["--target", rows_file],
        "cluster": ["clusters=5"],
        "format": ["lacks=tells"],
        "dedup": ["similar=0.999"],
    }.get(by, [])
    out = tmp_path / "some.jsonl"
    found = select(rows_file, "--by", by, "--keep", "6", "--base", base_folder, "--out", out, "--json", *settings)
    result = json.loads(found.stdout)
    rows, name = load_rows(str(out))
    assert name == "messages"
    assert 0 < len(rows) == result["kept"] <= 6
    source = [row.messages for row in load_rows(str(rows_file))[0]]
    assert all(row.messages in source for row in rows)
    places = [source.index(row.messages) for row in rows]
    assert places == sorted(places)
    head, *scores = lines(tmp_path / "some.jsonl.scores.jsonl")
    assert head["by"] == by
    assert len(scores) == 30
    again = tmp_path / "again.jsonl"
    select(rows_file, "--by", by, "--keep", "6", "--base", base_folder, "--out", again, *settings)
    assert again.read_bytes() == out.read_bytes()


def test_another_keep_reuses_the_scores_without_a_model(
    base_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (rows_file, "--by", "ifd", "--base", base_folder, "--json")
    first = json.loads(select(*command, "--keep", "3", "--out", tmp_path / "3.jsonl").stdout)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(choose, "load_base", never)
    more = json.loads(select(*command, "--keep", "5", "--out", tmp_path / "5.jsonl").stdout)
    assert not first["by"][0]["reused"]
    assert more["by"][0]["reused"]
    assert {json.dumps(r) for r in lines(tmp_path / "3.jsonl")} <= {json.dumps(r) for r in lines(tmp_path / "5.jsonl")}
    assert (tmp_path / "3.jsonl.scores.jsonl").read_bytes() == (tmp_path / "5.jsonl.scores.jsonl").read_bytes()
    for changed in (["ratio=loss"], []):
        if not changed:  # other rows
            rows_file.write_text("\n".join(rows_file.read_text().splitlines()[1:]))
        with pytest.raises(AssertionError, match="asked again"):
            select(*command, "--keep", "3", "--out", tmp_path / "other.jsonl", *changed)


def test_scores_are_kept_by_all_that_they_depend_on(pool_of: Callable[..., Pool]) -> None:
    rows, config = some_rows(6), IfdConfig(by="ifd")
    pool = pool_of(rows)
    other = tiny_tokenizer()
    other.add_tokens(["no-such-token"])
    changed = {
        "row": pool_of([*rows[:-1], replace(rows[-1], messages=rows[0].messages)]),
        "group": pool_of([*rows[:-1], replace(rows[-1], group="another")]),
        "mask": pool_of(rows, mask="everything"),
        "max_tokens": pool_of(rows, max_tokens=500),
        "over_length": pool_of(rows, over_length="truncate"),
        "tokenizer": replace(pool, renderer=Renderer(other)),
        "template": replace(pool, renderer=Renderer(tiny_tokenizer(), CHATML.replace("\\n", "\\n\\n"))),
    }
    keys = {what: choose._key(config, each, "base") for what, each in changed.items()}
    keys["nothing"] = choose._key(config, pool_of(rows), "base")
    keys["base"] = choose._key(config, pool, "another")
    keys["settings"] = choose._key(replace(config, ratio="loss"), pool, "base")
    assert len(set(keys.values())) == len(keys)
    assert choose._key(replace(config, keep=3), pool, "base") == keys["nothing"]


def test_damaged_scores_are_made_again(base_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    command = (rows_file, "--by", "longest", "--keep", "3", "--base", base_folder)
    select(*command, "--out", tmp_path / "a.jsonl")
    (scores_file,) = choose._scores_folder().glob("*.jsonl")
    scores_file.write_text(scores_file.read_text()[:50])
    select(*command, "--out", tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_what_is_there_is_not_overwritten(base_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows-kept.jsonl"
    out.write_text("precious")
    command = (rows_file, "--by", "longest", "--keep", "2", "--base", base_folder, "--out", out)
    with raises("output/already-exists", match="--overwrite"):
        select(*command)
    assert out.read_text() == "precious"
    select(*command, "--overwrite")
    assert len(lines(out)) == 2
    with raises("output/not-jsonl"):
        select(*command[:-1], tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--by", "ifd"], "recipe/missing-option", "say how many to keep"),
        (["--by", "ifd", "--keep", "1.5"], "recipe/invalid-value", "keep"),
        (["--by", "ifd", "--keep", "2", "bnad=low"], "recipe/unknown-key", "bnad: unknown key"),
        (["--by", "less", "--keep", "2"], "recipe/invalid-value", "target: this key has no default"),
        (["--by", "ifd", "--keep", "2", "--target", "x.jsonl"], "recipe/unknown-key", "target: unknown key"),
        (["--keep", "2"], "recipe/missing-option", "--by"),
        (["--by", "format", "matches=nowhere"], "data/no-rows-left", "leaves out all 30 rows"),
        (["--by", "format", "matches=["], "recipe/invalid-yaml", r"'matches=\[': the value is not valid YAML"),
        (["--by", "format", "matches"], "recipe/malformed-override", "'matches': write an override as key=value"),
        (
            ["--by", "ifd", "--keep", "10%"],
            "recipe/invalid-value",
            r"^--by ifd: keep: say how many rows \(100\) or which share.*'10%'\)$",
        ),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], code: str, message: str, base_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    with raises(code, match=message):
        select(rows_file, *arguments, "--base", base_folder, "--out", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_that_were_not_liked_are_chosen_among_too(base_folder: Path, tmp_path: Path) -> None:
    """A recipe trains on what it chooses, and not on these; a file is chosen from as it is."""
    file, out = tmp_path / "liked.jsonl", tmp_path / "kept.jsonl"
    rows = [{"prompt": f"{n}?", "completion": "one line", "label": n % 2 == 0} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(f"data: {{train: {file}}}\nselect: {{by: dedup}}\n")
    select(tmp_path / "recipe.yaml", "--base", base_folder, "--out", tmp_path / "fewer.jsonl")
    assert len((tmp_path / "fewer.jsonl").read_text().splitlines()) == 2
    select(file, "--by", "dedup", "--base", base_folder, "--out", out)
    assert [json.loads(line)["desirable"] for line in out.read_text().splitlines()] == [True, False, True, False]


def recipe(base: Path, rows: Path, **changes: Any) -> Recipe:
    tree = {"base": {"name": str(base), "dtype": "float32"}, "data": {"train": str(rows), "held_out": 4}} | changes
    return build(Recipe, tree, source="test")


def test_a_recipe_selects_in_turn_and_never_among_held_out_rows(base_folder: Path, rows_file: Path) -> None:
    plain = recipe(base_folder, rows_file)
    both = recipe(base_folder, rows_file, select=[{"by": "dedup"}, {"by": "longest", "keep": 0.5}])
    tokenizer = load_tokenizer(plain.base)
    before, after = prepare_data(plain, tokenizer), prepare_data(both, tokenizer)
    assert [row.where for row in after.held_out_rows] == [row.where for row in before.held_out_rows]
    trained, all_rows = ({e.where for e in data.examples} for data in (after, before))
    assert trained < all_rows
    assert "dedup kept" in after.chosen[0]
    dedup = int(after.chosen[0].split()[2])
    assert len(trained) == round(0.5 * dedup)
    one = recipe(base_folder, rows_file, select={"by": "longest", "keep": 5})
    assert len(prepare_data(one, tokenizer).examples) == 5


def test_a_run_trains_on_what_was_chosen(base_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    settings = {"train": {"steps": 2, "batch_rows": 3}, "delta": {"method": "lora", "r": 2}}
    chosen = recipe(base_folder, rows_file, select=[{"by": "ifd", "keep": 6}], **settings)
    result = graftlm.train(chosen, tmp_path / "out")
    assert result.summary["train"]["steps"] == 2
    assert "by: ifd" in (tmp_path / "out" / "recipe.yaml").read_text()
    file = tmp_path / "recipe.yaml"
    file.write_text((tmp_path / "out" / "recipe.yaml").read_text())
    select(file, "--out", tmp_path / "rows-kept.jsonl")
    assert len(lines(tmp_path / "rows-kept.jsonl")) == 6
    with raises("recipe/conflicting-settings"):
        select(file, "--by", "longest", "--keep", "2", "--out", tmp_path / "no.jsonl")


def test_nothing_is_asked_of_a_model_by_methods_that_count(
    base_folder: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    for by in ("longest", "length", "format", "dedup"):
        prepare_data(recipe(base_folder, rows_file, select={"by": by, "keep": 5}), load_tokenizer(str(base_folder)))


def test_rows_carry_the_scores_that_chose_them_where_the_order_asks_for_them(
    base_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    def prepared(order: str) -> Any:
        tree = {
            "base": {"name": str(base_folder)},
            "data": {"train": str(rows_file), "order": {"by": order}},
            "select": [{"by": "longest", "keep": 8}],
        }
        recipe = build(Recipe, tree, source="test")
        return prepare_data(recipe, load_tokenizer(recipe.base))

    chosen = prepared("selected").rows
    out = tmp_path / "out.jsonl"
    select(rows_file, "--by", "longest", "--keep", "8", "--base", base_folder, "--out", out)
    scores = {line["where"]: line["score"] for line in lines(tmp_path / "out.jsonl.scores.jsonl")[1:]}
    assert [row.score for row in chosen] == pytest.approx([scores[row.where] for row in chosen])
    assert all(row.score is None for row in prepared("length").rows)
