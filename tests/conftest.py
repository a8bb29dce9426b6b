"""Shared fixtures: everything is made here and now from tiny random models; nothing is fetched."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported anywhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.testing import save_tiny_base, tiny_model, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fingerprints of tiny bases do not belong in the user's cache; converted bases are expensive and do."""
    from graftlm.model import load

    folder = tmp_path_factory.mktemp("cache")
    load._fingerprint_folder = lambda: folder


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")
