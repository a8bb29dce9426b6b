"""What a wheel and a source distribution hold."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPPED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo")


def skipped(folder: str, names: list[str]) -> set[str]:
    """What a clone does not hold; `runs` is a package of graftlm, and elsewhere the folder of what was run."""
    runs = {"runs"} if Path(folder) == ROOT or ROOT / "benchmarks" in Path(folder).parents else set()
    return SKIPPED(folder, names) | runs


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[zipfile.ZipFile, tarfile.TarFile]:
    """Both, built from a copy by the setuptools that is installed: nothing is fetched."""
    copy, out = tmp_path_factory.mktemp("source") / "graftlm", tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, copy, ignore=skipped, symlinks=True)
    script = (
        "import sys; out = sys.argv[1]; from setuptools import build_meta; "  # which writes to sys.argv
        "build_meta.build_wheel(out); build_meta.build_sdist(out)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return zipfile.ZipFile(wheel), tarfile.open(source)


def test_the_wheel_holds_every_file_of_the_package(built: tuple[zipfile.ZipFile, tarfile.TarFile]) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "graftlm").rglob("*") if path.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    inside = {name for name in built[0].namelist() if ".dist-info/" not in name}
    assert inside == files
    assert {"graftlm/py.typed", "graftlm/recipes/quickstart.yaml", "graftlm/kernels/cpu.cpp"} <= inside


def test_what_the_index_is_told(built: tuple[zipfile.ZipFile, tarfile.TarFile]) -> None:
    (name,) = (name for name in built[0].namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_string(built[0].read(name).decode())
    classifiers = metadata.get_all("Classifier") or []
    assert "Typing :: Typed" in classifiers
    assert "Operating System :: POSIX :: Linux" in classifiers
    pythons = {each.rpartition(":")[2].strip() for each in classifiers if "Python :: 3." in each}
    assert pythons == {"3.10", "3.11", "3.12", "3.13"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert not re.findall(r"\]\((?!https?://)", metadata.get_payload()), (
        "a relative link leads nowhere on an index page"
    )
    needs = [need for need in metadata.get_all("Requires-Dist") or [] if need.endswith('extra == "eval"')]
    assert sorted(re.split(r"[<>=]", need)[0] for need in needs) == [
        "jsonschema",
        "jsonschema-specifications",
        "referencing",
        "sacrebleu",
    ]
    assert not [need for need in metadata.get_all("Requires-Dist") or [] if "torchao" in need]


def test_the_source_distribution_is_complete(built: tuple[zipfile.ZipFile, tarfile.TarFile]) -> None:
    inside = {name.partition("/")[2] for name in built[1].getnames()}
    for folder in ("docs", "tests", "benchmarks", "graftlm"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and not re.search(r"__pycache__|^benchmarks/\w+/runs/|/\.", name):
                assert name in inside, name
    assert {"README.md", "CHANGELOG.md", "Makefile", "LICENSE", "tests/conftest.py"} <= inside
    assert not [name for name in inside if "__pycache__" in name]
