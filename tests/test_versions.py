"""What is declared, what is pinned and what is imported agree; and untested versions are named."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from graftlm import versions
from graftlm.cli.terminal import prepare_libraries

if sys.version_info >= (3, 11):
    import tomllib
else:  # where Python has none, pytest brings it
    import tomli as tomllib

pytestmark = pytest.mark.versions

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ON_REQUEST = {"mlflow", "trackio", "wandb"}
"""In no extra: report.trackers says how to install the one that a recipe asks for."""


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(made.name): made for made in map(Requirement, lines)}


CORE = requirements(PROJECT["dependencies"])
EXTRAS = requirements([line for lines in PROJECT["optional-dependencies"].values() for line in lines])
SERVE = requirements(PROJECT["optional-dependencies"]["serve"])


def pins(file: str) -> dict[str, SpecifierSet]:
    """The pins of a constraint file that hold for the newest Python, by package."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    made = [Requirement(line) for line in lines]
    newest = [r for r in made if r.marker is None or r.marker.evaluate({"python_version": "3.13"})]
    return {canonicalize_name(r.name): r.specifier for r in newest}


def version(pin: SpecifierSet) -> Version:
    (only,) = pin
    assert only.operator == "=="
    return Version(only.version)


def imports() -> Iterator[tuple[str, str, bool]]:
    """(file, distribution, whether it is imported with the module) of everything in graftlm that others wrote."""
    distributions = packages_distributions()
    for path in sorted((ROOT / "graftlm").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "graftlm"}:
                (distribution,) = set(distributions.get(name, [name]))
                yield str(path.relative_to(ROOT)), canonicalize_name(distribution), node in tree.body


def test_what_is_imported_is_declared() -> None:
    found = list(imports())
    assert {"torch", "pyyaml", "pyarrow"} <= {distribution for _, distribution, _ in found}
    for file, distribution, at_once in found:
        assert distribution in CORE or distribution in EXTRAS or distribution in ON_REQUEST, (file, distribution)
        is_extra = file.startswith("graftlm/serve/") and distribution in SERVE  # the command imports it when it runs
        assert distribution in CORE or not at_once or is_extra, f"{file} needs {distribution}, which an extra brings"


def test_what_is_declared_is_imported() -> None:
    assert CORE.keys() <= {distribution for _, distribution, _ in imports()}


def test_every_dependency_has_a_range_with_two_ends() -> None:
    for name, requirement in CORE.items():
        assert {one.operator for one in requirement.specifier} == {">=", "<"}, name


def test_the_oldest_end_is_pinned_to_the_lower_bounds() -> None:
    extras = (
        "gguf",
        "accelerate",
        "schedulefree",
        "sacrebleu",
        "jsonschema",
        "jsonschema-specifications",
        "referencing",
    )
    declared = CORE | {name: EXTRAS[name] for name in extras}
    oldest, newest = pins(".ci/oldest.txt"), pins(".ci/newest.txt")
    assert oldest.pop("pyparsing")  # not ours: the oldest matplotlib calls what newer ones deprecate
    assert oldest.keys() == newest.keys() == declared.keys() - {"torch"}
    for name, pin in oldest.items():
        (lowest,) = (Version(one.version) for one in declared[name].specifier if one.operator == ">=")
        assert version(pin) == lowest, name
        assert version(newest[name]) in declared[name].specifier, name


def test_the_tested_set_pins_every_declared_package_within_its_range() -> None:
    tested = pins("constraints.txt")
    assert "torch" not in tested
    everything = requirements(
        [line for name in ("gguf", "test", "dev") for line in PROJECT["optional-dependencies"][name]]
    )
    for name, requirement in (CORE | everything).items():
        if name not in ("torch", "graftlm"):
            assert version(tested[name]) in requirement.specifier, name


def test_the_tested_versions_are_those_of_the_two_ends() -> None:
    ends = tuple(
        ".".join(str(version(pins(f".ci/{end}.txt")["transformers"])).split(".")[:2]) for end in ("oldest", "newest")
    )
    assert versions.TESTED["transformers"] == ends
    oldest, newest = versions.TESTED["torch"]
    assert f">={oldest}" in str(CORE["torch"].specifier)
    (default,) = re.findall(r"^TORCH +\?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert Version(oldest) <= Version(default) < Version(f"{newest}.999")


@pytest.mark.parametrize(
    ("torch", "transformers", "message"),
    [
        ("2.11.0", "5.24.0", ""),
        ("2.14.1+cpu", "5.20.2", ""),
        ("2.9.1", "5.24.0", "torch 2.9.1 is not tested with graftlm (2.11 to 2.14 are)"),
        ("2.15.0a0+git1", "5.24.0", "torch 2.15.0a0+git1 is not tested with graftlm (2.11 to 2.14 are)"),
        ("2.13.0", "5.25.0.dev0", "transformers 5.25.0.dev0 is not tested with graftlm (5.20 to 5.24 are)"),
        (
            "3.0.0",
            "6.1.0",
            "torch 3.0.0 is not tested with graftlm (2.11 to 2.14 are); "
            "transformers 6.1.0 is not tested with graftlm (5.20 to 5.24 are)",
        ),
    ],
)
def test_untested_versions_are_named(
    torch: str, transformers: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.__version__", torch)
    monkeypatch.setattr("transformers.__version__", transformers)
    monkeypatch.setattr(versions, "TESTED", {"torch": ("2.11", "2.14"), "transformers": ("5.20", "5.24")})
    assert versions.untested() == message


def test_the_command_line_warns_once_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "TESTED", {"torch": ("1.0", "1.1")})
    prepare_libraries()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("warning: torch ")
    assert shown.err.count("\n") == 1
