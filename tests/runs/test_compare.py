"""Runs that were made: found, told apart, compared, and never a reason to stop where one of them is damaged."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import graftlm.runs.compare as comparing
from graftlm import cli
from graftlm.config.schema import build, to_tree, to_yaml
from graftlm.recipe import Recipe
from graftlm.runs.compare import compare, short_names
from tests.errors import raises


def make(
    folder: Path, *, tuned: float | None = 2.0, base: float = 3.0, steps: int = 5, more: Any = None, **keys: Any
) -> Path:
    """A run as `graft train` leaves it; with `tuned=None` one that is not done."""
    folder.mkdir(parents=True)
    tree: dict[str, Any] = {"data": {"train": "x"}, "delta": {"method": "lora"}, "train": {"steps": steps}}
    for key, value in keys.items():
        section, _, name = key.partition("_")
        tree[section][name] = value
    recipe = build(Recipe, tree, source="test")
    lines = [{"step": n, "loss": 4 / n, "tokens": 10, "wall_s": 0.1} for n in range(1, steps + 1)]
    lines[2:2] = [{"event": "rank", "step": 2, "left": 3}]
    live = folder if tuned is not None else folder / "checkpoints"
    live.mkdir(exist_ok=True)
    (live / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if tuned is None:
        (live / "unfinished.json").write_text(json.dumps(to_tree(recipe)))
    else:
        (folder / "recipe.yaml").write_text(to_yaml(recipe))
        summary = {
            "held_out": {"loss_nats": {"base": base, "tuned": tuned}, "rouge_l": {"base": 0.1, "tuned": 0.2}},
            "train": {"tokens_per_s": 100.0, "steps": steps, "wall_s": 9.0, "peak_rss_gib": 1.5},
        }
        (folder / "summary.json").write_text(json.dumps(summary | (more or {})))
    return folder


def graft(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, ["runs", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_runs_are_found_below_folders_and_only_what_differs_is_a_column(tmp_path: Path) -> None:
    make(tmp_path / "a", delta_r=4, tuned=2.5)
    make(tmp_path / "deep" / "b", delta_r=16, tuned=2.25)
    make(tmp_path / "deep" / ".hidden")
    make(tmp_path / "a" / "checkpoints" / "5")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metrics.txt").touch()
    (tmp_path / "no-run").mkdir()
    found = compare([tmp_path])
    assert found.differ == ["delta.r"]
    first, second = found.rows()
    assert (first["run"], first["r"], first["status"]) == ("a", 4, "finished")
    assert (second["run"], second["r"]) == ("deep/b", 16)
    assert (second["base_loss"], second["tuned_loss"], second["tokens_per_s"]) == (3.0, 2.25, 100.0)
    assert (second["steps"], second["peak_rss_gib"], second["train_loss"]) == (5, 1.5, (4 / 4 + 4 / 5) / 2)
    assert [run.folder for run in compare([tmp_path / "a", tmp_path / "a"]).runs] == [tmp_path / "a"]
    with raises("recipe/no-such-folder"):
        compare([tmp_path / "nowhere"])


def test_a_run_that_is_not_done_is_listed_as_it_stands(tmp_path: Path) -> None:
    make(tmp_path / "on", tuned=None, delta_r=4)
    with open(tmp_path / "on" / "checkpoints" / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 6, "lo')  # it is being written just now
    make(tmp_path / "again", delta_r=4)  # and now it is made once more, with another recipe
    make(tmp_path / "other", tuned=None, steps=3, delta_r=16)
    (tmp_path / "other" / "checkpoints").rename(tmp_path / "again" / "checkpoints")
    (make(tmp_path / "new", tuned=None) / "checkpoints" / "metrics.jsonl").unlink()
    make(tmp_path / "kept", more={"interrupted": True}, delta_r=4)  # its checkpoints were deleted
    rows = {row["run"]: row for row in compare([tmp_path]).rows()}
    assert {name: (row["status"], row["steps"]) for name, row in rows.items()} == {
        "on": ("unfinished", 5), "again": ("unfinished", 3), "new": ("unfinished", 0), "kept": ("unfinished", 5),
    }  # fmt: skip
    assert rows["again"]["r"] == 16
    assert rows["again"]["tuned_loss"] is None, "what the earlier run has left is not this one's"
    assert rows["on"]["tokens_per_s"] == pytest.approx(100)
    assert rows["new"]["train_loss"] is None


def test_the_files_of_a_run_are_called_as_training_calls_them() -> None:
    from graftlm.training import checkpoints

    assert comparing.METRICS == checkpoints.METRICS
    assert Path(comparing.UNFINISHED).parts == (checkpoints.FOLDER, checkpoints.UNFINISHED)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', r"metrics.jsonl:2: not valid JSON"),
        ("metrics.jsonl", "[1]\n", r"metrics.jsonl:1: not a mapping"),
        ("metrics.jsonl", b"\xff\xfe\n", r"metrics.jsonl:1: not valid JSON"),
        ("summary.json", '{"held_out": ', r"summary.json: not valid JSON"),
        ("summary.json", "3", r"summary.json: not a mapping"),
        ("recipe.yaml", "base: [", r"recipe.yaml:\d: not valid YAML"),
        ("recipe.yaml", None, r"recipe.yaml is missing"),
        ("summary.json", None, r"summary.json is missing"),
        ("checkpoints/unfinished.json", "{", r"unfinished.json: not valid JSON"),
        ("recipe.yaml", b"\xff\xfe", r"codec can't decode"),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_compared(
    file: str, content: str | bytes | None, why: str, tmp_path: Path
) -> None:
    make(tmp_path / "well")
    bad = make(tmp_path / "bad") / file
    bad.parent.mkdir(exist_ok=True)
    if content is None:
        bad.unlink()
    else:
        bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = compare([tmp_path])
    assert [run.folder.name for run in found.runs] == ["well"]
    assert list(found.damaged) == [str(tmp_path / "bad")]
    assert re.search(why, found.damaged[str(tmp_path / "bad")])
    shown = graft(tmp_path)
    assert shown.exit_code == 0
    assert f"{tmp_path / 'bad'} cannot be read" in shown.stderr


def test_a_summary_that_lacks_figures_is_no_damage(tmp_path: Path) -> None:
    (make(tmp_path / "a") / "summary.json").write_text('{"held_out": {"loss_nats": null}, "train": 3}')
    row = compare([tmp_path]).rows()[0]
    assert row["tuned_loss"] is None
    assert row["peak_rss_gib"] is None


def test_rows_are_sorted_by_any_column_and_what_is_unknown_comes_last(tmp_path: Path) -> None:
    for name, rank, tuned in (("x10", 4, 2.0), ("x9", 64, 1.0), ("x1", 16, None)):
        make(tmp_path / name, delta_r=rank, tuned=tuned)
    found = compare([tmp_path])
    for sort, reverse, order in (
        (None, False, ["x1", "x9", "x10"]),
        ("r", False, [4, 16, 64]),
        ("delta.r", True, [64, 16, 4]),
        ("tuned_loss", False, [64, 4, 16]),
        ("tuned_loss", True, [4, 64, 16]),
    ):
        rows = found.rows(sort, reverse=reverse)
        assert [row["run" if sort is None else "r"] for row in rows] == order
    with raises("recipe/unknown-column", match="Did you mean 'tuned_loss'"):
        found.rows("tuned_los")


def test_over_seeds_mean_and_spread_are_those_of_single_runs(tmp_path: Path) -> None:
    losses = {4: [2.0, 2.5, 2.25], 16: [1.5, 1.0, 1.25]}
    for rank, each in losses.items():
        for seed, tuned in enumerate(each):
            make(tmp_path / f"{rank}-{seed}", delta_r=rank, train_seed=seed, tuned=tuned, base=3.0 + seed)
    make(tmp_path / "on", delta_r=4, train_seed=3, tuned=None)
    found = compare([tmp_path])
    rows = found.over_seeds()
    assert [(row["r"], row["seeds"]) for row in rows] == [(4, 3), (16, 3)]
    for row in rows:
        assert row["tuned_loss"] == {"mean": sum(losses[row["r"]]) / 3, "sd": pytest.approx(stdev(losses[row["r"]]))}
        gains = [3.0 + seed - tuned for seed, tuned in enumerate(losses[row["r"]])]
        assert row["gain"] == {"mean": pytest.approx(sum(gains) / 3), "sd": pytest.approx(stdev(gains))}
    assert compare([tmp_path / "4-0", tmp_path / "16-0"]).over_seeds() == [], "one seed has no spread"


def test_columns_have_the_shortest_name_that_tells_them_apart() -> None:
    assert short_names(["delta.r", "train.seed", "deltas.a.r", "train.steps"]) == {
        "delta.r": "delta.r", "train.seed": "seed", "deltas.a.r": "a.r", "train.steps": "train.steps",
    }  # fmt: skip


def test_the_command_prints_a_table_json_and_a_page(tmp_path: Path) -> None:
    for seed in (0, 1):
        make(tmp_path / f"s{seed}", train_seed=seed, delta_targets=["q_proj", "v_proj"] if seed else "all-linear")
    make(tmp_path / "s2", train_seed=2)
    tree = json.loads(graft(tmp_path, "--json", "--sort", "seed", "--reverse").stdout)
    assert tree.keys() == {"runs", "differ", "over_seeds", "damaged"}
    assert [row["seed"] for row in tree["runs"]] == [2, 1, 0]
    assert tree["differ"] == ["delta.targets", "train.seed"]
    shown = graft(tmp_path, "--html", tmp_path / "page.html")
    for word in ("tuned loss", "s1", "finished", "over seeds"):
        assert word in shown.stdout
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "[&#39;q_proj&#39;, &#39;v_proj&#39;]" in page
    for fetching in ("src=", "<link", "<script", "url(http", "@import"):
        assert fetching not in page
    (tmp_path / "empty").mkdir()
    assert "no run found" in graft(tmp_path / "empty").stdout
    assert json.loads(graft(tmp_path / "empty", "--json").stdout)["runs"] == []


def test_looking_at_runs_does_without_torch() -> None:
    script = "import sys, graftlm.runs.compare; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_recipes_of_runs_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", delta_r=4)
    tree = to_tree(build(Recipe, yaml.safe_load((folder / "recipe.yaml").read_text()), source="test"))
    recipe = compare([folder]).runs[0].recipe
    assert recipe["delta.r"] == tree["delta"]["r"] == 4
    assert recipe["delta.patterns"] == {}
