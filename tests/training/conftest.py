"""What several files here train on."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import graftlm.training.endpoint
from tests.training.judging import Endpoint


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
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(graftlm.training.endpoint.time, "sleep", lambda seconds: None)
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()
