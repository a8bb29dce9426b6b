"""Adapters and an unfinished run that commit cce2208 wrote, before modules moved into packages: they are still read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graftlm import load_adapter, load_base, train

BEFORE = Path(__file__).parent / "before_house"


@pytest.mark.parametrize("method", ["lora", "mora", "adalora"])
def test_an_adapter_of_before_has_the_logits_of_before(method: str) -> None:
    written = load_file(BEFORE / "logits.safetensors")
    model, _ = load_base(str(BEFORE / "base"), dtype="float32")
    load_adapter(model, BEFORE / method)
    with torch.no_grad():
        torch.testing.assert_close(model(written["ids"]).logits, written[method], rtol=0, atol=1e-5)


def test_an_unfinished_run_of_before_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(BEFORE, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    done = train("unfinished.yaml", "unfinished", resume=True)
    steps = [json.loads(line)["step"] for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 301))
    assert done.summary["train"]["steps"] == 300
