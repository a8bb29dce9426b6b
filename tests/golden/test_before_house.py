"""Adapters and an unfinished run that commit cce2208 wrote, before modules moved into packages: they are still read."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from graftlm import Recipe, load_adapter, load_base, train
from graftlm.config.schema import build
from tests.errors import raises

BEFORE = Path(__file__).parent / "before_house"


@pytest.mark.parametrize("method", ["lora", "mora", "adalora"])
def test_an_adapter_of_before_has_the_logits_of_before(method: str) -> None:
    written = load_file(BEFORE / "logits.safetensors")
    model, _ = load_base(str(BEFORE / "base"), dtype="float32")
    load_adapter(model, BEFORE / method)
    with torch.no_grad():
        torch.testing.assert_close(model(written["ids"]).logits, written[method], rtol=0, atol=1e-5)


def test_an_unfinished_run_of_before_is_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe has keys that are others now; nothing of it is lost."""
    shutil.copytree(BEFORE, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    recipe = yaml.safe_load(Path("unfinished.yaml").read_text())
    files = {path: path.read_bytes() for path in Path("unfinished").rglob("*") if path.is_file()}
    with raises("output/earlier-version", match="online, policies"):
        train(build(Recipe, recipe, source="test"), "unfinished", resume=True)
    assert {path: path.read_bytes() for path in Path("unfinished").rglob("*") if path.is_file()} == files
