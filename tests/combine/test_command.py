"""`graft compose`: options and recipes mean the same, and errors are one message."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from graftlm import cli
from graftlm.adapters.adapter import Adapter
from graftlm.adapters.save import save_adapter
from graftlm.combine.compose import compose
from graftlm.combine.rules import COMPOSERS
from graftlm.combine.rules.ties import TiesConfig
from graftlm.deltas.lora import LoraConfig
from graftlm.hub.load import load_base
from graftlm.model.attach import attach, detach
from graftlm.testing import save_tiny_base
from graftlm.testing.deltas import move
from tests.errors import raises


def graft(*arguments: str) -> Any:
    result = CliRunner().invoke(cli.app, ["compose", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and the adapters a, b and c of it."""
    folder = tmp_path_factory.mktemp("work")
    save_tiny_base(folder / "base")
    model, tokenizer = load_base(str(folder / "base"), dtype="float32")
    for seed, name in enumerate("abc"):
        attach(model, LoraConfig(r=2 + seed, targets=("q_proj", "up_proj")), seed=seed)
        save_adapter(move(model, seed=seed), folder / name, tokenizer=tokenizer)
        detach(model)
    return folder


def paths(folder: Path) -> list[str]:
    return [str(folder / name) for name in "abc"]


def test_options_a_recipe_and_python_make_the_same_adapter(folder: Path, tmp_path: Path) -> None:
    base = str(folder / "base")
    out = tmp_path / "by-options"
    done = graft(
        *paths(folder), "--by", "ties", "--weights", "1,0.5,-1", "--space", "core", "--density", "0.4",
        "--set", "majority=frequency", "--rank", "3", "--base", base, "--out", str(out),
    )  # fmt: skip
    assert done.exit_code == 0
    assert "ties: 3 adapters, 4 layers, rank 3" in done.stderr
    assert "not exact" in done.stderr
    made = Adapter.read(out)
    by = TiesConfig(density=0.4, majority="frequency")
    model = load_base(base).model
    wanted = compose(model, paths(folder), by=by, weights=[1.0, 0.5, -1.0], space="core", rank=3).adapter
    assert made.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(made.tensors[key], t) for key, t in wanted.tensors.items())
    assert made.chat.template is not None
    recipe = tmp_path / "recipe.yaml"
    tree = {"adapters": paths(folder), "by": {"name": "ties", "density": 0.4, "majority": "frequency"}}
    tree |= {"weights": [1, 0.5, -1], "rank": 3, "base": base}
    recipe.write_text(yaml.safe_dump(tree))
    for file, name in ((recipe, "by-recipe"), (out / "compose.yaml", "again")):
        assert graft(str(file), "--out", str(tmp_path / name)).exit_code == 0
        again = Adapter.read(tmp_path / name)
        assert all(torch.equal(again.tensors[key], t) for key, t in made.tensors.items()), name


def test_options_are_laid_over_a_recipe(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    tree = {"adapters": paths(folder), "by": {"name": "ties", "density": 0.4}, "base": str(folder / "base")}
    recipe.write_text(yaml.safe_dump(tree))
    out = tmp_path / "out"
    assert graft(str(recipe), "--density", "0.7", "--seed", "3", "--json", "--out", str(out)).exit_code == 0
    kept = yaml.safe_load((out / "compose.yaml").read_text())
    assert kept["by"] == {"name": "ties", "density": 0.7, "majority": "total", "scale": 1.0}
    assert kept["seed"] == 3


def test_json_has_a_report_of_every_layer(folder: Path, tmp_path: Path) -> None:
    done = graft(*paths(folder), "--base", str(folder / "base"), "--json", "--out", str(tmp_path / "out"))
    sites = json.loads(done.stdout)["sites"]
    assert len(sites) == 4
    assert {report["rank"] for report in sites.values()} == {2 + 3 + 4}
    assert {report["error"] for report in sites.values()} == {0.0}


def test_what_is_not_the_weighted_sum_is_told(folder: Path, tmp_path: Path) -> None:
    same = str(folder / "b")
    done = graft(same, same, "--by", "peft-linear", "--base", str(folder / "base"), "--out", str(tmp_path / "out"))
    assert "not the weighted sum: 50%" in done.stderr


def test_the_base_is_the_one_that_the_first_adapter_names(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = str(tmp_path / "out")
    with raises("base/no-such-base", match="--base"):
        graft(*paths(folder), "--out", out)
    monkeypatch.chdir(folder)
    assert graft("a", "b", "--out", out).exit_code == 0


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        (["--by", "teis"], "recipe/invalid-value", "'ties'"),
        (["--by", "ctm"], "recipe/invalid-value", "is a space"),
        (["--by", "ties", "--set", "densty=0.5"], "recipe/unknown-key", "density"),
        (["--by", "ties", "--density", "1.5"], "recipe/invalid-value", "density"),
        (["--by", "linear", "--density", "0.5"], "recipe/unknown-key", "density"),
        (["--space", "cores"], "recipe/invalid-value", "core"),
        (["--space", "factors"], "recipe/conflicting-settings", "linear has no space"),
        (["--weights", "1,2"], "recipe/unusable-weights", "2 weights for 3"),
        (["--by", "regmean"], "recipe/missing-moments", "in Python alone"),
    ],
)
def test_wrong_options_are_refused(folder: Path, tmp_path: Path, options: list[str], code: str, match: str) -> None:
    with raises(code, match=match):
        graft(*paths(folder), *options, "--base", str(folder / "base"), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def rows(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    texts = ["a b c", "the cat", "one two", "x y", "no", "yes it is", "red"]
    file.write_text("".join(json.dumps({"prompt": f"say {t}", "completion": t}) + "\n" for t in texts))
    return file


@pytest.mark.parametrize("by", ["linear", "lorahub"])
def test_a_search_finds_weights_and_its_recipe_makes_the_same_adapter(
    folder: Path, rows: Path, tmp_path: Path, by: str
) -> None:
    given = paths(folder)
    if by == "lorahub":  # factors of several ranks have no sum; and 1.5^2 of a small change is less than the penalty
        given = [str(tmp_path / "large")]
        graft(str(folder / "b"), "--weights=8", "--base", str(folder / "base"), "--out", *given)
    options = ["--by", by, "--search", str(rows), "--examples", "3", "--evaluations", "12", "--seed", "2"]
    done = graft(*given, *options, "--base", str(folder / "base"), "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "found on 3 rows of" in " ".join(done.stderr.split())
    text = (tmp_path / "out" / "compose.yaml").read_text()
    kept = yaml.safe_load(text)
    assert "search" not in {key for key, value in kept.items() if value is not None}
    assert len(kept["weights"]) == len(given)
    assert any(kept["weights"])
    assert "12 evaluations, seed 2" in text
    assert "loss with penalty: " in text
    assert graft(str(tmp_path / "out" / "compose.yaml"), "--out", str(tmp_path / "again")).exit_code == 0
    made, again = (Adapter.read(tmp_path / name) for name in ("out", "again"))
    assert all(torch.equal(again.tensors[key], t) for key, t in made.tensors.items())
    recipe = tmp_path / "recipe.yaml"
    tree = {"adapters": given, "by": by, "base": str(folder / "base"), "seed": 2}
    recipe.write_text(yaml.safe_dump(tree | {"search": {"rows": str(rows), "examples": 3, "evaluations": 12}}))
    done = graft(str(recipe), "--json", "--out", str(tmp_path / "by-recipe"))
    found = json.loads(done.stdout)["search"]
    assert found["weights"] == kept["weights"]
    assert found["value"] < found["start"]
    assert found["evaluations"] == 12


def test_cat_learns_weights_for_each_layer_and_its_recipe_makes_the_same_adapter(
    folder: Path, rows: Path, tmp_path: Path
) -> None:
    options = ["--by", "cat", "--search", str(rows), "--evaluations", "6", "--set", "learning_rate=0.2"]
    done = graft(*paths(folder), *options, "--base", str(folder / "base"), "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "weights of 4 layers, found on 5 rows of" in " ".join(done.stderr.split())
    assert "with the mean of the adapters" in " ".join(done.stderr.split())
    kept = yaml.safe_load((tmp_path / "out" / "compose.yaml").read_text())
    assert kept.get("search") is None
    assert kept["by"] == {"name": "cat", "learning_rate": 0.2}
    assert {len(weights) for weights in kept["weights"].values()} == {3}
    assert len(kept["weights"]) == 4
    assert len({tuple(weights) for weights in kept["weights"].values()}) == 4
    assert graft(str(tmp_path / "out" / "compose.yaml"), "--out", str(tmp_path / "again")).exit_code == 0
    made, again = (Adapter.read(tmp_path / name) for name in ("out", "again"))
    assert all(torch.equal(again.tensors[key], t) for key, t in made.tensors.items())
    with raises("recipe/missing-option", match="--search ROWS"):
        graft(*paths(folder), "--by", "cat", "--base", str(folder / "base"), "--out", str(tmp_path / "without"))


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        (["--weights", "1,1,1"], "recipe/conflicting-settings", "leave out one of the two"),
        (["--by", "ties"], "recipe/conflicting-settings", "--by ties --weights"),
        (["--evaluations", "1"], "recipe/nothing-found", "--evaluations"),
    ],
)
def test_a_search_that_cannot_be_or_finds_nothing_is_refused(
    folder: Path, rows: Path, tmp_path: Path, options: list[str], code: str, match: str
) -> None:
    with raises(code, match=match):
        graft(
            *paths(folder), "--search", str(rows), *options, "--base", str(folder / "base"),
            "--out", str(tmp_path / "out"),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_options_of_a_search_need_one(folder: Path, tmp_path: Path) -> None:
    done = graft(*paths(folder), "--examples", "3", "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "--search ROWS" in done.stderr


def test_a_wrong_key_of_a_recipe_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("adapters: [a, b]\nby: ties\nspaec: core\n")
    with raises("recipe/unknown-key", match=r"recipe.yaml:3.*'space'"):
        graft(str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"))


def test_weights_are_numbers_and_a_folder_that_is_there_stays(folder: Path, tmp_path: Path) -> None:
    assert "expected numbers such as 1,0.5,-1" in graft("a", "--weights", "1,x", "--out", str(tmp_path / "out")).stderr
    with raises("output/already-exists"):
        graft(*paths(folder), "--out", str(tmp_path))


def test_the_help_names_every_rule() -> None:
    text = " ".join(graft("--help").stdout.replace("│", " ").split())
    broken_at_hyphens = text.replace("- ", "-")
    assert all(name in broken_at_hyphens for name in COMPOSERS)
