"""Decision records: numbered without gaps, of one form, short, and all in the index."""

import re

import pytest

from tests.docs_run.names import ROOT

FOLDER = ROOT / "docs" / "decisions"
RECORDS = sorted(FOLDER.glob("[0-9]*.md"))


def test_records_are_numbered_without_gaps() -> None:
    assert [record.name[:4] for record in RECORDS] == [f"{n:03}-" for n in range(1, len(RECORDS) + 1)]
    assert len(RECORDS) >= 19


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)
def test_a_record_is_a_page_with_four_headings_and_stands_in_the_index(record: object) -> None:
    text = record.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    number, name = record.name[:3], record.name  # type: ignore[attr-defined]
    heading = re.match(r"# (\d+): (.+)\n", text)
    assert heading is not None
    assert heading[1] == number
    assert re.findall(r"^## (.+)$", text, re.M) == ["Context", "Decision", "Turned down", "Price"]
    assert len(text.splitlines()) <= 60, "a record is one page"
    assert f"- [{number}]({name}): {heading[2]}\n" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_pages_are_ascii_and_lines_are_not_endless() -> None:
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        if "made by docs/generate.py" not in (text := page.read_text(encoding="utf-8")):
            assert text.isascii(), page
            long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "{", "- ["))]
            assert not long, f"{page}: {long}"
