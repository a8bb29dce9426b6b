"""graftlm.rows_report: what `graft data check` prints, from Python."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import graftlm
from graftlm.cli import app
from graftlm.testing import save_tiny_base
from tests.errors import raises


@pytest.fixture
def recipe(tmp_path: Path, rows: Path) -> Path:
    base = save_tiny_base(tmp_path / "base")
    file = tmp_path / "recipe.yaml"
    file.write_text(f"base: {base}\ndata: {{train: {rows}, held_out: 4}}\ntrain: {{threads: 1}}\n")
    return file


def test_it_is_what_graft_data_check_says(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["data", "check", str(recipe), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report.pop("held_out_rows") == 4
    assert report.pop("shown")[0]["tokens"][0]["weight"] == 0
    assert json.loads(json.dumps(graftlm.rows_report(recipe).to_json())) == report
    assert report["rows"] == 20


def test_a_recipe_its_file_and_its_data_are_the_same(recipe: Path) -> None:
    whole = graftlm.read_recipe(recipe)
    by_file, by_recipe = graftlm.rows_report(str(recipe)), graftlm.rows_report(whole)
    assert by_file.to_json() == by_recipe.to_json()
    assert by_file.survey is not None
    assert graftlm.rows_report(whole, survey=False).survey is None


def test_rows_alone_are_checked_with_the_defaults_of_a_recipe(rows: Path, smollm2: str) -> None:
    by_file, by_data = graftlm.rows_report(rows), graftlm.rows_report(graftlm.DataConfig(train=str(rows)))
    assert by_file.to_json() == by_data.to_json()
    assert (by_file.rows, by_file.format, by_file.mask) == (24, "prompt-completion", "response")


def test_what_cannot_be_checked_is_an_error(tmp_path: Path) -> None:
    with raises("recipe/no-such-recipe"):
        graftlm.rows_report(tmp_path / "absent.yaml")
    with raises("data/no-such-file", match=r"absent\.jsonl"):
        graftlm.rows_report(tmp_path / "absent.jsonl")
