"""The tests of the tier `long`: a group of them at a time, each with a record of the commit and the date.

    python benchmarks/long/run.py            every group
    python benchmarks/long/run.py GROUP ...  these alone

A test belongs to a group by its marker: `@pytest.mark.long(group="kill")`. A group writes benchmarks/long/GROUP.json,
with the figures that its tests give to pytest's `record_property`.
The script exits with 1 where a test fails, or where a group has no test.
"""

import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from machine import machine  # noqa: E402


class Groups:
    """Collects the names of the groups while pytest collects the tests."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = {marker.kwargs["group"] for item in session.items for marker in item.iter_markers("long")}


def groups() -> list[str]:
    found = Groups()
    pytest.main(["--collect-only", "-qq", "--no-summary", "-m", "long", str(ROOT / "tests")], plugins=[found])
    return sorted(found.names)


def run(group: str) -> bool:
    """Run the tests of a group and write what came of them. Whether all passed."""
    report = HERE / f".{group}.xml"
    chosen = ["-m", f"long(group={group!r})", f"--junitxml={report}", "-o", "junit_family=xunit1", str(ROOT / "tests")]
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-n", "auto", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    report.unlink(missing_ok=True)
    failed = [
        case.attrib["name"] for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    result = {
        "machine": machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "passed": done.returncode == 0,
        "tests": len(cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
        "failed": failed,
        "seconds": round(time.monotonic() - began),
    }
    figures = {each.attrib["name"]: each.attrib["value"] for case in cases for each in case.iter("property")}
    result |= {"figures": figures} if figures else {}
    (HERE / f"{group}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return done.returncode == 0


if __name__ == "__main__":
    known = groups()
    unknown = sorted(set(sys.argv[1:]) - set(known))
    if unknown or not known:
        sys.exit(f"no group {', '.join(unknown)}: the groups are {', '.join(known) or 'none'}")
    results = [run(group) for group in sys.argv[1:] or known]
    sys.exit(not all(results))
