"""The factors that an adapter is compute what the attached adapter does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.factors import factors_of
from graftlm.adapters.folder import RECORD, WEIGHTS
from graftlm.adapters.load import attach_adapter
from graftlm.adapters.save import save_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.model.factors import attach_factors
from graftlm.model.modes import by_row
from graftlm.model.registry import hosts
from graftlm.testing import tiny_model
from graftlm.testing.deltas import close, ids, logits, perturbed
from tests.adapters.folders import edit_tensors, ours
from tests.errors import raises

CONFIGS = {
    "plain": LoraConfig(r=4, alpha=6),
    "rslora": LoraConfig(r=4, alpha=6, rslora=True, dropout=0.2),
    "patterns": LoraConfig(r=4, alpha=6, patterns={"q_proj": {"r": 2}, "mlp.down_proj": {"alpha": 3}}),
    "embedding": LoraConfig(r=4, targets=("embed_tokens", "q_proj")),
    "pissa": LoraConfig(r=2, init="pissa"),
}


def check_same(folder: Path, kind: str = "llama") -> None:
    adapter = Adapter.read(folder)
    attached, model = tiny_model(kind), tiny_model(kind)
    attach_adapter(attached, adapter)
    for name in ("one", "two"):  # without hosts, and where another adapter has made them
        found = factors_of(model, adapter)
        assert found is not None
        attach_factors(model, name, found)
        with by_row(model, [(name,)] * 2), torch.no_grad():
            close(model(ids()).logits, logits(attached), str(folder))


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_of_ours(name: str, tmp_path: Path) -> None:
    folder = save_adapter(ours(CONFIGS[name]), tmp_path / "one")
    check_same(folder)


@pytest.mark.parametrize("name", ["plain", "rslora", "patterns", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_of_another_tool(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_adapter(ours(CONFIGS[name]), tmp_path / "one")
    (folder / RECORD).unlink()
    save_file({key: t.to(dtype) for key, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    check_same(folder)


@pytest.mark.parametrize("method", ["vera", "lora-xs", "melora", "moslora", "tied-lora", "nola", "loha"])
def test_other_methods_whose_changes_have_factors(method: str, tmp_path: Path) -> None:
    check_same(save_adapter(perturbed(method, tiny_model()), tmp_path / "one"))


def test_parts_of_fused_layers(tmp_path: Path) -> None:
    model = ours(LoraConfig(r=4, targets=("c_attn.q", "c_attn.v")), kind="gpt2")
    check_same(save_adapter(model, tmp_path / "one"), "gpt2")


@pytest.mark.parametrize("method", ["oft", "ia3", "houlsby", "dora", "shira", "prefix", "full"])
def test_none_where_there_are_no_factors(method: str, tmp_path: Path) -> None:
    folder = save_adapter(perturbed(method, tiny_model()), tmp_path / "one")
    model = tiny_model()
    assert factors_of(model, Adapter.read(folder)) is None
    assert not hosts(model)


def test_an_adapter_that_does_not_fit_is_refused_as_when_it_is_attached(tmp_path: Path) -> None:
    folder = save_adapter(ours(), tmp_path / "one")
    with raises("base/other-base"):
        factors_of(tiny_model(seed=5), Adapter.read(folder))
    assert factors_of(tiny_model(seed=5), Adapter.read(folder), trust_base=True)
    for host in (False, True):
        (folder / RECORD).unlink(missing_ok=True)
        edit_tensors(folder, lambda tensors: tensors.pop(next(key for key in tensors if "lora_A" in key)))
        model = tiny_model()
        if host:
            whole = factors_of(model, Adapter.read(save_adapter(ours(), tmp_path / "whole")))
            attach_factors(model, "whole", whole or {})
        with raises("adapter/does-not-fit-model"):
            factors_of(model, Adapter.read(folder))
