"""`graft env` and `graft init`: what a bug report needs, and a recipe to start from."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from graftlm import cli
from graftlm.config.schema import to_tree
from graftlm.recipe import read_recipe
from graftlm.recipes import recipes


def graft(*arguments: str) -> Any:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_env_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'my compiler 1.2.3'\necho 'more'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found = json.loads(graft("env", "--json").stdout)
    assert found["packages"]["torch"] == torch.__version__
    assert found["python"]["version"] == platform.python_version()
    assert found["processor"]["torch_threads"] == torch.get_num_threads()
    assert found["processor"]["name"]
    assert 0 < found["memory_gib"]["free"] <= found["memory_gib"]["total"]
    assert found["kernels"]["compiler"] == str(compiler)
    assert found["kernels"]["compiler_version"] == "my compiler 1.2.3"
    assert found["cache"] == {"folder": str(tmp_path), "bytes": dict.fromkeys(found["cache"]["bytes"], 0)}
    assert set(found["cache"]["bytes"]) == {"bases", "fingerprints", "kernels", "rows", "scores"}


def test_env_says_the_same_to_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / f"{'a' * 32}.safetensors").write_bytes(b"x" * 2**21)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    found, output = json.loads(graft("env", "--json").stdout), graft("env").stdout
    for part in (
        found["graftlm"],
        found["processor"]["name"],
        str(tmp_path),
        "rows 2.0 MiB",
        *found["packages"].values(),
    ):
        assert part in output
    assert f"{found['processor']['cores']}, " in output
    assert "C++ compiler  none" in output


def test_init_lists_the_recipes_with_what_they_are_for() -> None:
    output = graft("init").stdout
    for name in recipes():
        assert name in output
    assert "docstrings" in output


@pytest.mark.parametrize("name", list(recipes()))
def test_init_writes_a_recipe_that_is_the_one_shipped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert graft("init", name).exit_code == 0
    written = (tmp_path / f"{name}.yaml").read_text()
    assert written == recipes()[name].read_text()
    assert written.startswith("# ")
    assert to_tree(read_recipe(tmp_path / f"{name}.yaml")) == to_tree(read_recipe(recipes()[name]))


def test_what_init_writes_trains(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but for a base and a number of steps that take seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    assert graft("init", "quickstart", "--out", "mine.yaml").exit_code == 0
    small = [f"base={base_folder}", "train.steps=2", "data.held_out=4", "report.max_new_tokens=2"]
    done = graft("train", "mine.yaml", *small, "--out", "adapter")
    assert done.exit_code == 0
    assert json.loads(Path("adapter/summary.json").read_text())["train"]["steps"] == 2
    assert yaml.safe_load(Path("adapter/recipe.yaml").read_text())["data"]["train"] == "builtin:docstrings"


def test_init_does_not_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    result = CliRunner().invoke(cli.app, ["init", "quickstart", "--out", str(out)])
    assert type(result.exception).__name__ == "OutputError"
    assert out.read_text() == "mine"
    assert graft("init", "quickstart", "--out", str(out), "--overwrite").exit_code == 0
    assert out.read_text() == recipes()["quickstart"].read_text()


def test_a_recipe_that_is_not_there_is_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = graft("init", "quickstar")
    assert result.exit_code == 2
    assert "quickstart" in result.output
    assert graft("init", "--overwrite").exit_code == 2
    assert not list(tmp_path.iterdir())
