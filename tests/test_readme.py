"""README, the benchmarks and the comparison: figures name their machine, claims about other projects have a source."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig as PeftLoraConfig
from peft.utils import PeftType

from graftlm.planning.advice import facts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_is_one_screen_and_a_half() -> None:
    assert len(README.splitlines()) <= 110


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_tour_names_every_package_and_nothing_that_does_not_exist() -> None:
    tree = re.search(r"## The packages\n.*?```text\n(.*?)```", (ROOT / "docs" / "tour.md").read_text(), re.S)
    assert tree is not None
    folders: list[tuple[int, Path]] = []
    names = set()
    for line in tree[1].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = (folders[-1][1] if folders else ROOT) / name
        assert path.exists(), f"{path} is in the tour's tree and not in the repository"
        names.add(path)
        if name.endswith("/"):
            folders.append((indent, path))
    packages = {file.parent for file in (ROOT / "graftlm").rglob("__init__.py")}
    assert packages <= names, f"the tour does not name {packages - names}"


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first line is `heading`, without that line and the one below it."""
    lines = text[text.index(heading) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


HEADING = "| | graftlm | PEFT |"
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
COMPARISON = (ROOT / "docs" / "comparison.md").read_text()
SOURCES = (ROOT / "docs" / "sources.md").read_text()


def claims() -> dict[tuple[str, str], str]:
    """(row, project) -> what docs/comparison.md says about that project."""
    projects = COMPARISON[COMPARISON.index(HEADING) :].splitlines()[0].strip("| ").split(" | ")[1:]
    cells = {}
    for row, _, *others in table(COMPARISON, HEADING):
        assert len(others) == len(projects), row
        cells.update({(row, project): cell for project, cell in zip(projects, others, strict=True)})
    return {key: cell for key, cell in cells.items() if cell not in ("-", "?")}


def sources() -> dict[tuple[str, str], tuple[str, str]]:
    found = {}
    for row, project, says, source in table(SOURCES, "| row | project |"):
        assert (row, project) not in found
        found[row, project] = says, source
    return found


def test_every_claim_about_another_project_has_a_source() -> None:
    cells, found = claims(), sources()
    assert len(cells) > 40
    assert {key: says for key, (says, _) in found.items()} == cells, (
        "docs/sources.md repeats the cells of docs/comparison.md"
    )


def test_every_source_is_a_file_or_a_version_and_a_date() -> None:
    for key, (_, source) in sources().items():
        files = re.findall(r"\]\(\.\./([^)]+)\)", source)
        assert all((ROOT / file).is_file() for file in files), key
        version = re.search(r"(\d+\.\d+\.\d+|at [0-9a-f]{7}) ", source) and re.search(r"\(20\d\d(-\d\d){0,2}\)", source)
        assert files or version, f"{key}: {source}"
        assert source.startswith(("run: ", "read: ")), key


@pytest.mark.parametrize(
    ("source", "good"),
    [("read: some page", False), ("run: PEFT 0.21.2", False), ("run: PEFT 0.21.2 (2026-10), x", True)],
)
def test_a_source_without_version_or_date_would_be_found_out(
    source: str, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.test_readme.sources", lambda: {("a", "b"): ("c", source)})
    if good:
        test_every_source_is_a_file_or_a_version_and_a_date()
    else:
        with pytest.raises(AssertionError):
            test_every_source_is_a_file_or_a_version_and_a_date()


def test_what_is_counted_of_peft_and_of_ours_is_right() -> None:
    """Of the PEFT that is installed; the variants of LoRA are counted in its configuration and by the class names."""
    from peft.tuners.lora import variants

    cells = {row[0]: row for row in table(COMPARISON, HEADING)}
    types, mapped = len(PeftType), {row["peft_type"] for row in facts() if row["peft_type"]}
    assert f"{len(mapped)} of PEFT's {types} types" in cells["adapters of the others"][1]
    assert {"LILY"} <= {each.value for each in PeftType} - mapped
    assert any(field.name == "kasa_config" for field in dataclasses.fields(PeftLoraConfig))
    kinds = {re.sub(r"(Linear|Embedding|Conv\w*)?Variant$", "", name).strip("_") for name in vars(variants)}
    kinds = {kind for kind in kinds if any(f"{kind}{of}Variant" in vars(variants) for of in ("Linear", "Embedding"))}
    assert cells["methods"][2].startswith(f"{types} types and {len(kinds)} variants of LoRA: {types + len(kinds)},")
    exact = sum(row["factors"] for row in facts())
    assert cells["any method in a server that reads LoRA"][1].startswith(f"{exact} methods exactly")


def test_readme_shows_rows_of_the_comparison_and_of_the_figures() -> None:
    whole = {row[0]: row for row in table(COMPARISON.replace("](../", "]("), HEADING)}
    shown = table(README, HEADING)
    assert len(shown) > 4
    assert all(whole[row[0]] == row for row in shown)
    figures = table(BENCHMARKS.replace("](../", "]("), FIGURES)
    assert len(table(README, FIGURES)) == 6
    assert all(row in figures for row in table(README, FIGURES))


FIGURES = "| measured | figure |"


def test_every_figure_names_its_processor_and_cores() -> None:
    rows = table(BENCHMARKS, FIGURES)
    assert len(rows) > 30
    for what, _, where in rows:
        name = re.match(r"\[(\w+)\]\(\.\./benchmarks/\1/result\.json\), ", where)
        assert name is not None, what
        machine = json.loads((ROOT / "benchmarks" / name[1] / "result.json").read_text())["machine"]
        assert machine["processor"] in where, what
        assert where.endswith(f"{machine['cores']} cores"), what
        if not re.search(r"\d", machine["processor"]):
            assert all(each in where for each in machine["bf16_products"]), f"{what}: the name tells no model"


def test_the_page_of_a_package_index_has_no_link_into_the_repository() -> None:
    page = (ROOT / "docs" / "package.md").read_text()
    assert page.partition("-->\n\n")[2].startswith("# graftlm\n")
    assert not re.findall(r"\]\((?!https?://)", page)
    assert len(page) > 0.8 * len(re.sub(r"\]\([^)]*\)", "]", README))
