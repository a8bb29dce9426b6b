"""The routes of runs: what there is, by name, without a path of the server, in JSON that every reader reads."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from graftlm.serve import training_runs
from graftlm.serve.errors import ApiError
from tests.runs.test_compare import make


def client_of(folder: Path) -> TestClient:
    app = FastAPI()
    for path, get in training_runs.gets(folder).items():
        app.add_api_route(path, get, methods=["GET"])
    app.add_exception_handler(ApiError, lambda request, error: error.response(request.url.path))
    return TestClient(app)


def get(folder: Path, path: str) -> Any:
    answer = client_of(folder).get(path)
    assert answer.status_code == 200
    assert str(folder) not in answer.text
    return json.loads(answer.text, parse_constant=lambda constant: pytest.fail(constant))


def test_runs_are_listed_by_what_differs(tmp_path: Path) -> None:
    make(tmp_path / "ranks" / "r=4", delta_r=4)
    make(tmp_path / "ranks" / "r=16", delta_r=16, tuned=1.5)
    make(tmp_path / "live", tuned=None)
    found = get(tmp_path, "/runs")
    assert [run["name"] for run in found["runs"]] == ["live", "ranks/r=4", "ranks/r=16"]
    assert [run["r"] for run in found["runs"]][1:] == [4, 16]
    assert [run["tuned_loss"] for run in found["runs"]] == [None, 2.0, 1.5]
    assert found["damaged"] == {}


def test_a_damaged_run_is_named_without_its_path(tmp_path: Path) -> None:
    make(tmp_path / "good")
    (make(tmp_path / "bad") / "summary.json").write_text("{")
    found = get(tmp_path, "/runs")
    assert found["damaged"] == {"bad": "bad/summary.json: not valid JSON"}
    assert [run["name"] for run in found["runs"]] == ["good"]


def test_a_folder_that_is_a_run_and_an_empty_one(tmp_path: Path) -> None:
    make(tmp_path / "one")
    (tmp_path / "none").mkdir()
    assert [run["name"] for run in get(tmp_path / "one", "/runs")["runs"]] == ["one"]
    assert get(tmp_path / "one", "/runs/one")["figures"]["steps"] == 5
    assert get(tmp_path / "none", "/runs")["runs"] == []


def test_one_run_has_its_curve_its_recipe_and_what_was_measured(tmp_path: Path) -> None:
    make(tmp_path / "a" / "b", delta_r=4)
    found = get(tmp_path, "/runs/a/b")
    assert found["recipe"]["delta.r"] == 4
    assert found["held_out"]["loss_nats"] == {"base": 3.0, "tuned": 2.0}
    assert [point[:2] for point in found["curve"]] == [[n, 4 / n] for n in range(1, 6)]


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", more={"held_out": {"loss_nats": {"base": math.nan, "tuned": math.inf}}})
    with open(folder / "metrics.jsonl", "a") as out:
        out.write('{"step": 6, "loss": NaN, "tokens": 1, "wall_s": 0.1}\n')
    found = get(tmp_path, "/runs/a")
    assert found["held_out"]["loss_nats"] == {"base": None, "tuned": None}
    assert len(found["curve"]) == 5
    get(tmp_path, "/runs")


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 5000])
def test_a_curve_keeps_its_ends_and_its_length_is_bounded(count: int) -> None:
    steps = [{"step": n, "loss": float(n)} for n in range(count)]
    points = training_runs.curve(steps)
    assert len(points) == min(count, training_runs.POINTS)
    if count:
        assert points[0][0] == 0
        assert points[-1][0] == count - 1
    assert all(one[0] < two[0] for one, two in zip(points, points[1:], strict=False))


@pytest.mark.parametrize("name", ["b", "..%2foutside", "a%2f..%2fa", ".%2fa", "%2e", "/etc", "a/", "A"])
def test_a_name_that_is_no_run_is_not_found(tmp_path: Path, name: str) -> None:
    make(tmp_path / "outside")
    make(tmp_path / "runs" / "a")
    assert client_of(tmp_path / "runs").get(f"/runs/{name}").status_code == 404
