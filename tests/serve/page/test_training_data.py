"""The routes of training data: the check of `graft data check`, made once, and rows token by token."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from graftlm.rows import check_rows, recipe_of_rows
from graftlm.serve import training_data
from graftlm.testing import save_tiny_base


def client_of(recipe: Any) -> TestClient:
    app = FastAPI()
    for path, get in training_data.gets(recipe).items():
        app.add_api_route(path, get, methods=["GET"])
    return TestClient(app)


def test_without_a_source_there_is_nothing_to_look_at() -> None:
    client = client_of(None)
    assert client.get("/data").json() == {"source": None}
    assert client.get("/data/report").status_code == 404


def test_the_report_is_that_of_the_check_and_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(12)]
    rows[7] = rows[3]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = save_tiny_base(tmp_path / "base")
    recipe = recipe_of_rows(str(file), [f"base={base}", "data.held_out=0"])
    checks: list[Any] = []
    monkeypatch.setattr(training_data, "check_rows", lambda *a, **k: checks.append(a) or check_rows(*a, **k))
    client = client_of(recipe)
    assert client.get("/data").json() == {"source": str(file)}
    assert not checks, "the name costs nothing"
    found = client.get("/data/report").json()
    assert client.get("/data/report").json() == found
    assert len(checks) == 1
    assert ["rows", "12"] in found["figures"]
    copies = next(each for each in found["findings"] if each["kind"] == "exact duplicates")
    assert copies["count"]
    assert {f"{file}:4", f"{file}:8"} <= set(copies["rows"])
    assert len(found["rows"]) == 12
    for row, shown in zip(rows, found["rows"], strict=True):
        texts = ["".join(token["text"] for token in shown["tokens"] if (token["weight"] > 0) == on) for on in (0, 1)]
        assert row["prompt"] in texts[0]
        assert row["completion"] not in texts[0]
        assert row["completion"] in texts[1]
