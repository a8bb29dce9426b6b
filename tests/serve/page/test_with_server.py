"""The page on the real server: it is open where all else needs the key, and the server answers what it asks."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graftlm.cli import app
from graftlm.serve import page
from tests.runs.test_compare import make

KEY = {"Authorization": "Bearer s3cret"}


@pytest.fixture
def client(limited: Any, tmp_path: Path) -> Any:
    make(tmp_path / "runs" / "a")
    return limited(keys=["s3cret"], runs=tmp_path / "runs").client


def test_the_page_is_open_and_nothing_else_is(client: Any) -> None:
    for path in page.PATHS:
        assert client.get(path).status_code == 200
    for path in ("/runs", "/runs/a", "/v1/models", "/page/", "/page/other.js"):
        assert client.get(path).status_code == 401, path
    assert client.post("/").status_code == 405
    assert client.get("/runs/a", headers=KEY).json()["figures"]["steps"] == 5
    missing = client.get("/runs/b", headers=KEY)
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "run_not_found"


def test_a_folder_of_runs_that_is_not_there_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["serve", "--base", "none", "--runs", str(tmp_path / "none")])
    assert found.exit_code == 2
    assert "there is no such folder" in found.output


def test_without_a_folder_there_are_no_runs(limited: Any) -> None:
    client = limited().client
    assert client.get("/runs").json()["runs"] is None
    assert client.get("/runs/a").status_code == 404


def test_tokens_of_an_answer_are_scored_as_the_page_asks(client: Any) -> None:
    """What compare.js does: the prompt of each model, the tokens of the text, and their log-probabilities."""
    text = {"model": "tiny", "prompt": "an answer", "add_special_tokens": False, "return_token_strs": True}
    found = client.post("/tokenize", json=text, headers=KEY).json()
    assert "".join(found["token_strs"]) == "an answer"
    messages = [{"role": "user", "content": "hello"}]
    scores = []
    for model in ("tiny", "plain"):
        prompt = client.post("/tokenize", json={"model": model, "messages": messages}, headers=KEY).json()["tokens"]
        body = {"model": model, "prompt": prompt + found["tokens"], "echo": True, "logprobs": 0, "max_tokens": 0}
        (choice,) = client.post("/v1/completions", json=body, headers=KEY).json()["choices"]
        values = choice["logprobs"]["token_logprobs"]
        assert len(values) == len(prompt) + found["count"]
        scores.append(values[len(prompt) :])
        assert all(value < 0 for value in scores[-1])
    assert scores[0] != scores[1]
