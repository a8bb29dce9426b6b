"""Adapters that older versions of PEFT wrote, against what these computed with them: tests/golden/make_peft.py."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from graftlm.adapters.load import load_adapter
from graftlm.model.registry import attachment
from graftlm.model.state_dict import merged_state
from graftlm.testing.deltas import close
from tests.golden.make_peft import CASES, IDS, base

HERE = Path(__file__).parent
VERSIONS = ("0.4", "0.8", "0.13")
MADE = [(version, case) for version in VERSIONS for case in CASES if (HERE / f"peft-{version}" / case).is_dir()]


@pytest.mark.parametrize(("version", "case"), MADE)
def test_an_adapter_of_an_older_peft_computes_the_same(version: str, case: str) -> None:
    folder = HERE / f"peft-{version}"
    wanted = load_file(folder / "logits.safetensors")[case]
    model: Any = base(**CASES[case][1]).requires_grad_(False)
    note = load_adapter(model, folder / case)
    assert "another tool" in note
    assert attachment(model).configs["default"].method == ("dora" if case.startswith("dora") else "lora")
    with torch.no_grad():
        close(model(input_ids=IDS).logits, wanted, f"PEFT {version}, {case}")
        plain = type(model)(type(model.config).from_dict(model.config.to_dict() | {"tie_word_embeddings": False}))
        plain.load_state_dict(merged_state(model))
        close(plain.eval()(input_ids=IDS).logits, wanted, f"PEFT {version}, {case}: merged")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_are_of_the_version_that_they_say_and_none_is_missing(version: str) -> None:
    folder = HERE / f"peft-{version}"
    with safe_open(folder / "logits.safetensors", "pt") as handle:
        assert handle.metadata()["peft"].startswith(f"{version}.")
        cases = set(handle.keys())
    assert cases == {case for number, case in MADE if number == version}
    later = {"0.4": {"rslora", "patterns", "dora"}, "0.8": {"dora"}, "0.13": set[str]()}
    assert {case for case in CASES if case not in cases} == {c for c in CASES if c.startswith(tuple(later[version]))}


@pytest.mark.long(group="peers")
@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_come_out_the_same_when_they_are_made_again(version: str, tmp_path: Path) -> None:
    name = f"peft-{version}"
    command = ["make", "peers", f"NAME={name}", f"GOLDEN={tmp_path}", f"PYTHON={sys.executable}"]
    subprocess.run(command, cwd=HERE.parent.parent, check=True)
    files = sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.*") if file.is_file())
    assert files == sorted(file.relative_to(HERE) for file in (HERE / name).rglob("*.*") if file.is_file())
    for file in files:
        if file.suffix == ".safetensors":
            made, golden = load_file(tmp_path / file), load_file(HERE / file)
            assert made.keys() == golden.keys()
            for key in made:
                close(made[key], golden[key], f"{file}: {key}", tolerance=1e-6)
