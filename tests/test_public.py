"""The public face: names, tables, and what importing costs."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import graftlm
from graftlm.data.chat.masks import MASKS
from graftlm.data.sources.formats import FORMATS
from graftlm.data.sources.records import BUILTIN, READERS
from graftlm.data.sources.source import DataConfig, SourceConfig
from graftlm.deltas import METHODS
from graftlm.deltas.inits import INITS
from graftlm.losses import LOSSES
from graftlm.planning.advice import measured
from graftlm.recipe import Recipe

PACKAGE = Path(graftlm.__file__).parent


def test_every_public_name_exists() -> None:
    for name in graftlm.__all__:
        assert getattr(graftlm, name) is not None
    assert callable(graftlm.train)


def test_importing_the_package_and_the_command_line_does_not_import_torch() -> None:
    modules = "graftlm, graftlm.cli, graftlm.config.schema, graftlm.versions"
    script = f"import sys, {modules}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_no_method_file_is_missing_from_the_table() -> None:
    files = {p.stem for p in (PACKAGE / "deltas").glob("*.py")} - {"__init__", "base", "linalg", "starts"}
    listed = {method.delta.__module__.rpartition(".")[2] for method in METHODS.values()}
    assert files == listed
    files = {p.stem for p in (PACKAGE / "deltas" / "inits").glob("[!_]*.py")}
    assert {name.replace("-", "_") for name in INITS} == {"zero"} | files


def test_every_method_is_named_by_its_config() -> None:
    for name, method in METHODS.items():
        assert method.config().method == name  # type: ignore[call-arg]
        assert method.delta.family in ("addition", "specification", "reparameterisation")
        assert "arXiv:" in method.delta.paper


def test_a_recipe_offers_exactly_what_the_tables_hold() -> None:
    def choices(cls: type, field: str) -> set[str]:
        return set(cls.__dataclass_fields__[field].type.__args__)  # type: ignore[attr-defined]

    assert choices(DataConfig, "mask") == set(MASKS)
    assert choices(SourceConfig, "format") == {"auto", *FORMATS}
    losses = Recipe.__dataclass_fields__["loss"].type.__args__[0].__args__  # type: ignore[attr-defined]
    assert {loss().name for loss in losses} == set(LOSSES)
    assert set(BUILTIN) == {"docstrings"}
    assert set(READERS) == {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"}


def test_no_method_file_mentions_plumbing() -> None:
    for file in (PACKAGE / "deltas").glob("[!_]*.py"):
        if file.stem == "base":
            continue
        text = file.read_text()
        for word in (".cuda", "bfloat16", "device", "quantiz", "def merge"):
            assert word not in text, f"{file.name} mentions {word}: that belongs to graftlm/model/"
        assert 20 <= len(text.splitlines()) <= 120, f"{file.name} has {len(text.splitlines())} lines"


def test_a_method_s_learning_rate_is_the_one_that_was_measured() -> None:
    runs = measured()["methods"]
    others = yaml.safe_load((PACKAGE.parent / "benchmarks" / "methods" / "config.yaml").read_text())["rates"]
    assert runs.keys() <= METHODS.keys()
    assert others.keys() <= METHODS.keys()
    for name, run in runs.items():
        wanted = others.get(name, run["learning_rate"])
        assert METHODS[name].delta.learning_rate == pytest.approx(wanted, rel=1e-3), name
