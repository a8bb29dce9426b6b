"""`graft library`: what the commands print, and their exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graftlm import cli
from graftlm.adapters.save import save_adapter
from graftlm.hub.load import load_base
from graftlm.library.library import REMOVED, read_library
from graftlm.testing.deltas import perturbed
from tests.errors import raises
from tests.library.adapters import adapter, factors, in_other_factors, write


def graft(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, ["library", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """`first`, the same adapter in other factors, and another one; all with a score."""
    adapter(in_other_factors(factors(1), 5)).write(tmp_path / "copy")
    for name, folder, value in (
        ("first", write(tmp_path / "a", 1), 0.7),
        ("copy", tmp_path / "copy", 0.6),
        ("other", write(tmp_path / "b", 2), 0.1),
    ):
        done = graft("add", tmp_path / "shelf", folder, "--name", name, "--score", f"exact={value}:50")
        assert done.exit_code == 0
        assert f"added {name}" in done.stderr
        assert "nobody checked the base" in done.stderr
    return tmp_path / "shelf"


def test_what_was_said_is_listed(shelf: Path, tmp_path: Path) -> None:
    words = (
        "--description",
        "Answers [in] rhyme",
        "--licence",
        "Apache-2.0",
        "--score",
        "exact=0.5",
        "--score",
        "loss=1.5:8",
    )
    assert graft("add", shelf, tmp_path / "a", "--name", "poet", *words).exit_code == 0
    tree = json.loads(graft("list", shelf, "--json").stdout)
    assert list(tree) == ["copy", "first", "other", "poet"]
    poet = tree["poet"]
    assert poet["scores"] == {"exact": {"value": 0.5, "n": None}, "loss": {"value": 1.5, "n": 8}}
    assert (poet["description"], poet["licence"], poet["ranks"]) == ("Answers [in] rhyme", "Apache-2.0", [4])
    assert poet["digest"].startswith("sha256:")
    table = graft("list", shelf).stdout
    assert "Answers [in] rhyme" in table
    assert "exact 0.7 (n=50)" in table
    assert [each["name"] for each in json.loads(graft("search", shelf, "rhyme", "--json").stdout)] == ["poet"]
    assert "poet" in graft("search", shelf, "rhyme").stdout


def test_verify_has_an_exit_code_for_what_is_wrong(shelf: Path) -> None:
    assert graft("verify", shelf).exit_code == 0
    (shelf / "first" / "adapter_config.json").write_text("{}")
    (shelf / "library.json").rename(shelf / "kept.json")
    assert graft("verify", shelf).exit_code == 3
    (shelf / "kept.json").rename(shelf / "library.json")
    done = graft("verify", shelf)
    assert done.exit_code == 3
    assert done.stdout == "first: adapter_config.json is not what was added\n"
    tree = json.loads(graft("verify", shelf, "--json").stdout)
    assert [finding["name"] for finding in tree["findings"]] == ["first"]
    assert graft("verify", shelf, "--repair").exit_code == 3


def test_near_duplicates_are_listed_and_the_worse_one_is_taken_out(shelf: Path) -> None:
    tree = json.loads(graft("duplicates", shelf, "--json").stdout)
    assert tree["compared"] == ["copy", "first", "other"]
    (pair,) = tree["pairs"]
    assert (pair["one"], pair["other"]) == ("copy", "first")
    assert pair["cosine"] == pytest.approx(1, abs=1e-5)
    done = graft("duplicates", shelf)
    assert "1.0000" in done.stdout
    assert "1 pairs" in done.stderr
    shown = graft("prune", shelf)
    assert shown.stdout == "copy (exact 0.6) goes, first (exact 0.7) stays\n"
    assert "nothing was done" in shown.stderr
    assert list(read_library(shelf).entries) == ["copy", "first", "other"]
    assert graft("prune", shelf, "--yes").exit_code == 0
    assert list(read_library(shelf).entries) == ["first", "other"]
    assert (shelf / REMOVED / "copy" / "adapter_config.json").is_file()
    assert graft("prune", shelf, "--yes").stdout == "nothing to take out\n"
    assert graft("verify", shelf).exit_code == 0


def test_the_lowest_score_may_be_the_best_one(shelf: Path) -> None:
    assert graft("prune", shelf, "--lowest-is-best", "--yes", "--delete").exit_code == 0
    assert list(read_library(shelf).entries) == ["copy", "other"]
    assert not (shelf / REMOVED).exists()


def test_adapters_are_taken_out_by_name(shelf: Path) -> None:
    done = graft("remove", shelf, "other", "first")
    assert done.exit_code == 0
    assert "2 taken out" in done.stderr
    with raises("adapter/not-in-library"):
        graft("remove", shelf, "other")


def test_rows_are_searched_on_the_base_that_the_adapters_name(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(base_folder))
    save_adapter(perturbed("lora", model), tmp_path / "one", tokenizer=tokenizer)
    shelf = tmp_path / "shelf"
    assert graft("add", shelf, tmp_path / "one", "--examples", rows).exit_code == 0
    options = ("--rows", rows, "--base", base_folder)
    tree = json.loads(graft("search", shelf, *options, "--by", "loss", "--json").stdout)
    assert tree["by"] == "loss"
    assert tree["rows"] == 24
    assert [each["name"] for each in tree["found"]] == ["one"]
    assert tree["base_loss"] > 0
    done = graft("search", shelf, *options)
    assert "by embedding" in done.stderr
    with raises("base/no-such-base", match="--base"):
        graft("search", shelf, "--rows", rows)


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "DIR"),
        ("search", "DIR", "text", "--rows", "rows.jsonl"),
        ("search", "DIR", "text", "--by", "loss"),
        ("search", "DIR", "--rows", "rows.jsonl", "--by", "luck"),
        ("add", "DIR", "one", "--score", "exact"),
        ("add", "DIR", "one", "--score", "exact=nan"),
        ("add", "DIR", "one", "--score", "exact=1:0"),
        ("add", "DIR", "one", "--score", "=1"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert graft(*arguments).exit_code == 2
