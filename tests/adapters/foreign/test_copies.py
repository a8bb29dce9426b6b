"""Copies of frozen weights, up to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.adapters.foreign.copies import copied_rows
from graftlm.adapters.load import load_adapter
from graftlm.testing import tiny_model
from tests.adapters.foreign.folders import edit_tensors, lora, refused, tied
from tests.peers import peft_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("copy", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_copy_of_the_embeddings_is_the_bases_up_to_rounding(
    base: torch.dtype, copy: torch.dtype, tmp_path: Path
) -> None:
    """With numbers that float16 has no place for at either end."""

    def table() -> Any:
        model = tied()
        model.model.embed_tokens.weight.data[7, :4] = torch.tensor([1e-9, -3e-7, 7e4, -1e5])
        return model

    peft_adapter(lora(target_modules=["embed_tokens", "q_proj"]), table(), tmp_path / "a")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update({key: tensors[key].to(copy)}))
    load_adapter(table().to(base), tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update({key: tensors[key].float()}))  # once rounded, then wide
    load_adapter(table().to(base), tmp_path / "a")
    refused(tmp_path / "a", "adapter/does-not-fit-model", f"{key}: is another base's", model=tied().to(base))


@pytest.mark.parametrize("copy", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1 + 2**-6, 0.0, -1.0, torch.nan, torch.inf])
def test_a_copy_with_one_other_number_is_another_bases(copy: torch.dtype, factor: float) -> None:
    own = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    rounded = own.to(copy)
    assert copied_rows(own, rounded).all()
    assert copied_rows(own.to(torch.bfloat16), rounded).all()
    rounded[4, 3] *= factor
    assert copied_rows(own, rounded).tolist() == [True, True, True, True, False, True]


def test_an_embedding_of_another_base_is_no_resized_one(tmp_path: Path) -> None:
    peft_adapter(lora(target_modules=["embed_tokens"]), tiny_model(seed=1), tmp_path / "a")
    refused(tmp_path / "a", "adapter/does-not-fit-model", "embed_tokens.base_layer.weight: is another base's")
    peft_adapter(lora(), tiny_model(seed=1), tmp_path / "b", save_embedding_layers=True)
    refused(tmp_path / "b", "adapter/does-not-fit-model", "embed_tokens.weight: is another base's")
