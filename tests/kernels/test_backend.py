"""Backends by name: what each computes with, and what is refused where it cannot."""

import importlib

import pytest
import torch

from graftlm.kernels import cpu, linear
from graftlm.kernels.backend import OURS, TORCH, check_compiler, pinned, rotates_halves
from tests.errors import raises

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "wanted"),
    {"llama": True, "qwen3": True, "gemma2": True, "gpt_neox": False, "phi3": False, "cohere": False}.items(),
)
def test_rotary_embeddings_rotate_halves_where_the_model_does_that(name: str, wanted: bool) -> None:
    file = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    assert rotates_halves(file.apply_rotary_pos_emb) is wanted
    generator = torch.Generator().manual_seed(3)
    q, k, cos, sin = (
        torch.randn(s, generator=generator) for s in ((2, 4, 5, 16), (2, 2, 5, 16), (2, 5, 16), (2, 5, 16))
    )
    same = [
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(linear.by_halves(q, k, cos, sin), file.apply_rotary_pos_emb(q, k, cos, sin), strict=True)
    ]
    assert all(same) or not wanted


def test_compiling_without_a_compiler_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with raises("training/no-compiler"):
        check_compiler(torch.device("cpu"))
    check_compiler(torch.device("cuda"))  # Triton brings its own


def test_a_name_is_its_backend() -> None:
    assert pinned("torch", CPU, torch.float32) is TORCH
    if not cpu.unavailable(CPU, torch.bfloat16):
        assert pinned("ours", CPU, torch.bfloat16) is OURS


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [("cpu", torch.float32, "float32 on cpu"), ("cuda", torch.bfloat16, "bfloat16 on cuda")],
)
def test_our_kernels_are_refused_where_they_do_not_compute(device: str, dtype: torch.dtype, reason: str) -> None:
    with raises("training/kernels-unavailable", match=f"ours: .*{reason}"):
        pinned("ours", torch.device(device), dtype)


def test_our_kernels_are_refused_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with raises("training/kernels-unavailable", match="darwin"):
        pinned("ours", CPU, torch.bfloat16)
