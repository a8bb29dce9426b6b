"""What several files here train on."""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest

import graftlm.display.pages as report
import graftlm.judges.endpoint
from tests.training.judging import Endpoint, running_endpoint


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    with open(file, "w") as out:
        for number in range(24):
            out.write(
                json.dumps({"prompt": f"question {number}" * (1 + number % 3), "completion": f"the answer {number}"})
                + "\n"
            )
    return file


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For files with many runs: to draw the pictures of a report takes longer than to train for a few steps.

    Files whose subject is the report, among them test_run.py and test_runs.py, have it drawn.
    """
    monkeypatch.setattr(report, "figure", lambda *given, **named: (MagicMock(), MagicMock()))
    monkeypatch.setattr(report, "svg", lambda drawn: "<svg></svg>")


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(graftlm.judges.endpoint.time, "sleep", lambda seconds: None)
    with running_endpoint() as made:
        yield made
