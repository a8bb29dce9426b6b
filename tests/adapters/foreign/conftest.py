"""The folder of an adapter that PEFT wrote."""

from pathlib import Path

import pytest

from tests.adapters.foreign.folders import lora, tied
from tests.peers import peft_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """LoRA on two kinds of layer of the tied tiny model."""
    peft_adapter(lora(), tied(), tmp_path / "adapter")
    return tmp_path / "adapter"
