"""Folders of adapters: ours, and the same as another tool leaves it."""

from pathlib import Path

import pytest

from graftlm.adapters.folder import RECORD
from graftlm.adapters.save import save_adapter
from tests.adapters.folders import ours


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(ours(), tmp_path / "adapter")


@pytest.fixture
def foreign(adapter: Path) -> Path:
    """The same as another tool would have left it: without our record."""
    (adapter / RECORD).unlink()
    return adapter
