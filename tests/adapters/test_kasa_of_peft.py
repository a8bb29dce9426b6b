"""KaSA in PEFT's spelling: whole outputs of both libraries, from folders of either."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.export.lint import lint
from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.combine.compose import compose
from graftlm.deltas.kasa import Kasa, KasaConfig
from graftlm.model.attach import attach
from graftlm.model.registry import attachment, hosts
from graftlm.testing import tiny_model
from graftlm.testing.deltas import close, logits, move
from tests.errors import raises

TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore")


def of_peft(folder: Path, **changes: Any) -> Any:
    """A model of PEFT away from its start, saved to a folder."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | changes
    config = peft.LoraConfig(kasa_config=peft.KasaConfig(beta=0.3, gamma=0.7), **options)
    model = move(peft.get_peft_model(tiny_model(), config).eval())
    model.save_pretrained(folder)
    return model


def deltas(model: Any) -> dict[str, Kasa]:
    return {name: delta for name, host in hosts(model).items() if isinstance(delta := host.deltas["default"], Kasa)}


@pytest.mark.parametrize("changes", [{}, {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"down_proj": 3}}])
def test_a_folder_of_peft_computes_the_same_here(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = of_peft(tmp_path / "peft", **changes)
    said = load_adapter(model := tiny_model(), tmp_path / "peft")
    assert "20 tensors that PEFT does not store were computed" in said
    config = attachment(model).configs["default"]
    assert isinstance(config, KasaConfig)
    assert (config.beta, config.gamma, config.cut) == (0.3, 0.7, "paper")
    close(logits(model), logits(theirs), "whole outputs", 1e-5)
    assert float((logits(model) - logits(tiny_model())).norm() / logits(model).norm()) > 0.01
    assert any(delta.site.d_out < delta.site.d_in - 4 for delta in deltas(model).values()), "a wide layer is cut, too"


def test_a_folder_of_ours_is_read_by_peft_and_by_us_without_an_svd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = KasaConfig(r=3, alpha=9, cut="paper", targets=tuple(TARGETS), patterns={"o_proj": {"r": 2}})
    save_adapter(move(model := attach(tiny_model(), config)), tmp_path / "ours")
    stored = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert stored["peft_type"] == "LORA"
    assert stored["kasa_config"] == {"beta": config.beta, "gamma": config.gamma}
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "ours").eval()
    close(logits(theirs), logits(model), "in PEFT", 1e-5)
    monkeypatch.setattr(torch.linalg, "svd", None)
    load_adapter(again := tiny_model(), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


def test_there_and_back_every_tensor_is_the_same(tmp_path: Path) -> None:
    of_peft(tmp_path / "peft")
    load_adapter(model := tiny_model(), tmp_path / "peft")
    save_adapter(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert theirs.keys() == {key for key in ours if "kasa_noise" not in key}
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_the_cut_of_the_code_is_not_in_peft_s_layout(tmp_path: Path) -> None:
    save_adapter(attach(tiny_model(), KasaConfig(r=3)), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "GRAFTLM"


def test_it_is_not_taken_for_a_lora(tmp_path: Path) -> None:
    theirs = of_peft(tmp_path / "peft")
    adapter = Adapter.read(tmp_path / "peft")
    made = compose(tiny_model(), [adapter]).adapter
    made.write(tmp_path / "composed")
    load_adapter(model := tiny_model(), tmp_path / "composed")
    close(logits(model), logits(theirs), "its factors, with N", 1e-5)
    text = str(lint(tmp_path / "peft"))
    assert "kasa_config" in text
    with raises("adapter/does-not-fit-model"):
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text()) | {"kasa_config": None}
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
        load_adapter(tiny_model(), tmp_path / "peft")
