"""Safetensors files that are written piece by piece are those of the library."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graftlm.adapters.export import shards
from graftlm.adapters.export.merged import merge_into
from graftlm.adapters.export.shards import BLOCK, Shards, join, stored_tensors_of
from graftlm.testing import tiny_model
from graftlm.testing.deltas import close, logits, perturbed

PIECES = [
    {"odd": torch.arange(3).bfloat16(), "flags": torch.tensor([True, False, True])},
    {"numbers": torch.arange(5), "one": torch.tensor(2.5), "none": torch.empty(0, 4)},
    {"wide": torch.randn(7, 3, dtype=torch.float64), "half": torch.ones(5, 1, dtype=torch.float16)},
]


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    same = found.keys() == wanted.keys()
    return same and all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in wanted.items())


def test_pieces_of_any_dtype_become_one_file_that_the_library_reads(tmp_path: Path) -> None:
    written = Shards(tmp_path)
    for piece in PIECES:
        written.add(piece)
    written.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert equal(load_file(tmp_path / "model.safetensors"), {k: t for piece in PIECES for k, t in piece.items()})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    for tensor in stored_tensors_of(tmp_path / "model.safetensors"):
        items = max(1, torch.Size(tensor.about["shape"]).numel())
        assert tensor.start % max(1, tensor.length // items) == 0, f"{tensor.name} is not aligned"


def test_a_tensor_of_several_blocks_is_copied_whole(tmp_path: Path) -> None:
    large = {"large": torch.arange(BLOCK // 4 + 3, dtype=torch.int32)}
    save_file(large, tmp_path / "piece")
    assert join([tmp_path / "piece"], tmp_path / "out") == ["large"]
    assert equal(load_file(tmp_path / "out"), large)


def test_what_does_not_fit_into_one_file_is_several_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)  # a layer of the tiny model has some 28 kB
    model = perturbed("lora", tiny_model())
    merge_into(model, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert files == [*(f"model-{i}-of-00004.safetensors" for i in ("00001", "00002", "00003", "00004")), files[-1]]
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    sizes = [t.nbytes for file in files[:-1] for t in load_file(tmp_path / "out" / file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    close(logits(again), logits(model), "from several files")
