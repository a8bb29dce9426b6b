"""The public face: names, tables, and what importing costs."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import graftlm
from graftlm import testing
from graftlm.data.chat.masks import MASKS
from graftlm.data.sources.formats import FORMATS
from graftlm.data.sources.records import BUILTIN, READERS
from graftlm.data.sources.source import DataConfig, SourceConfig
from graftlm.data.sources.tasks.table import TASKS
from graftlm.deltas import METHODS
from graftlm.deltas.inits import INITS
from graftlm.losses import LOSSES
from graftlm.planning.advice import measured
from graftlm.recipe import Recipe

PACKAGE = Path(graftlm.__file__).parent


PUBLIC = {
    "__version__", "Adapter", "BaseConfig", "DataConfig", "INITS", "LoraConfig", "METHODS", "Recipe", "ReportConfig",
    "SourceConfig", "TrainConfig", "activate", "answer", "attach", "attach_adapter", "by_row", "check_packing",
    "collect", "deltas_off", "detach", "export", "generate", "lint", "load_adapter", "load_base", "load_rows",
    "merged_state", "quantize", "read_recipe", "render", "rows_report", "save_adapter", "train",
}  # fmt: skip
OF_TESTING = {"save_tiny_base", "tiny_model", "tiny_tokenizer"}


def test_the_public_names_are_these() -> None:
    """A name comes or goes on purpose: here, and in CHANGELOG.md."""
    assert set(graftlm.__all__) == PUBLIC
    assert len(graftlm.__all__) == len(PUBLIC)
    assert set(testing.__all__) == OF_TESTING
    assert dir(graftlm) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}) + sorted(OF_TESTING))
def test_a_public_name_imports_and_its_docstring_says_what_it_returns_and_raises(name: str) -> None:
    found = getattr(testing if name in OF_TESTING else graftlm, name)
    if isinstance(found, dict):  # a table is described by its module
        assert (sys.modules[graftlm._HOME[name]].__doc__ or "").startswith(f"{name}: the table")
        return
    text = found.__doc__ or ""
    assert re.search(r"[Rr]aises?\b|\b[A-Za-z]+Error\b", text), f"{name}: what does it raise?"
    if not inspect.isclass(found):
        assert re.search(r"\b([Rr]eturn|[Yy]ield)(s|ed)?\b", text), f"{name}: what does it return?"
        assert not [p for p in inspect.signature(found).parameters.values() if p.annotation is p.empty]


def test_what_type_checkers_see_is_what_the_lazy_table_imports() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        for each in statement.names:
            assert each.asname is not None
            own = "" if each.asname == each.name else f":{each.name}"
            seen[each.asname] = f"{statement.module}{own}"
    assert seen == graftlm._HOME


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        graftlm.no_such_name  # noqa: B018


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
        assert "arXiv:" in method.delta.paper or "openreview.net/" in method.delta.paper


def test_a_recipe_offers_exactly_what_the_tables_hold() -> None:
    def choices(cls: type, field: str) -> set[str]:
        return set(cls.__dataclass_fields__[field].type.__args__)  # type: ignore[attr-defined]

    assert choices(DataConfig, "mask") == set(MASKS)
    assert choices(SourceConfig, "format") == {"auto", *FORMATS}
    losses = Recipe.__dataclass_fields__["loss"].type.__args__[0].__args__  # type: ignore[attr-defined]
    assert {loss().name for loss in losses} == set(LOSSES)
    assert set(BUILTIN) == {"docstrings", "tasks", *(f"tasks/{name}" for name in TASKS)}
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
