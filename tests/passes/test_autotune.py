"""Which backend computes which calls: chosen by what was measured, stored, and used as it was chosen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graftlm.data.batches.pack import Example, Pack, collate
from graftlm.deltas.lora import LoraConfig
from graftlm.kernels import cpu
from graftlm.kernels.attention import AttentionRule, SegmentLayout
from graftlm.kernels.backend import OURS, TORCH, Backend
from graftlm.model.attach import attach
from graftlm.model.registry import trainable
from graftlm.passes import autotune
from graftlm.passes.autotune import KernelChoice, ShapeClass, Timing, choose, class_of
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.testing import tiny_model
from tests.kernels.equations import normal
from tests.peers import relative_error

CPU = torch.device("cpu")

needs_kernels = pytest.mark.skipif(
    bool(cpu.unavailable(CPU, torch.bfloat16)), reason="our kernels cannot be built here"
)


def model_with_lora(dtype: torch.dtype = torch.bfloat16) -> Any:
    model = tiny_model("llama", initializer_range=0.1).to(dtype)
    attach(model, LoraConfig(r=4, alpha=8))
    for number, parameter in enumerate(trainable(model).values()):
        parameter.data.add_(0.1 * normal(*parameter.shape, seed=number))
    return model


def pack_of(*lengths: int) -> Pack:
    rows = [torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    return collate([Example(row.int().numpy(), np.arange(len(row), dtype=np.float32), "") for row in rows])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache. Libraries that this process has loaded stay."""
    cpu.unavailable(CPU, torch.bfloat16)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    return tmp_path / "kernels"


class Clock:
    """Time that passes only where a candidate computes: `costs` seconds a call of an operation."""

    def __init__(self) -> None:
        self.now = 0.0

    def backend(self, by: Backend, **costs: float) -> Backend:
        def costly(function: Callable[..., Any], cost: float) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                self.now += cost
                return function(*arguments, **options)

            return call

        return Backend(
            low_rank_linear=costly(by.low_rank_linear, costs.get("low_rank_linear", 1.0)),
            attention=costly(by.attention, costs.get("attention", 1.0)),
            rms_norm=costly(by.rms_norm, costs.get("rms_norm", 1.0)),
            silu_gate=costly(by.silu_gate, costs.get("silu_gate", 1.0)),
            rotary=lambda function: costly(by.rotary(function), costs.get("rotary", 1.0)),
        )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(autotune, "_now", lambda x: made.now)
    return made


# Classes -------------------------------------------------------------------------------------------------------------


def test_calls_are_of_one_class_where_operation_widths_and_size_to_a_power_of_two_agree() -> None:
    A, B = torch.zeros(4, 32), torch.zeros(48, 4)

    def linear(rows: int) -> ShapeClass:
        return class_of("low_rank_linear", (torch.zeros(rows, 32), torch.zeros(48, 32), None, A, B, None))

    assert linear(64) == linear(127) == class_of("low_rank_linear", (torch.zeros(1, 100, 32), None, None, A, B))
    assert len({linear(63), linear(64), linear(128)}) == 3
    assert str(linear(64)) == "low_rank_linear 32 x 48, 64 to 127 rows"
    rule = AttentionRule(SegmentLayout([60, 68]), 1.0, None, None, 0)
    q, k = torch.zeros(4, 128, 16), torch.zeros(2, 128, 16)
    assert str(class_of("attention", (q, k, k, rule))) == "attention 4 x 2 x 16, 64 to 127 tokens a segment"
    assert str(class_of("rotary", (q[None], k[None], None, None))) == "rotary 4 x 2 x 16, 128 to 255 rows"
    assert class_of("rms_norm", (torch.zeros(3, 32), None, 1e-6)) == ShapeClass("rms_norm", (32,), 2)


# Choosing ------------------------------------------------------------------------------------------------------------


@needs_kernels
def test_the_fastest_is_chosen_class_by_class(cache: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "OURS", clock.backend(OURS, attention=1.0, rms_norm=3.0, silu_gate=2.05))
    monkeypatch.setattr(autotune, "TORCH", clock.backend(TORCH, attention=2.0, rms_norm=1.0, silu_gate=2.0))
    found = choose(model_with_lora(), [pack_of(20, 50), pack_of(100, 101, 102)])
    by = {
        each.operation: {name for e, name in found.fastest.items() if e.operation == each.operation}
        for each in found.fastest
    }
    assert by == {
        "low_rank_linear": {"ours"},  # as fast as each other: the first
        "attention": {"ours"},
        "rms_norm": {"torch"},
        "silu_gate": {"ours"},  # within 3 % of the fastest
        "rotary": {"ours"},
    }
    sizes = {each.size for each in found.fastest if each.operation == "low_rank_linear"}
    assert sizes == {(70).bit_length(), (303).bit_length()}
    attention = next(timing for each, timing in found.timings.items() if each.operation == "attention")
    assert attention.microseconds == pytest.approx({"ours": 1e6, "torch": 2e6})
    assert attention.calls == 2, "one a layer"
    assert "attention: ours" in found.lines()


@needs_kernels
def test_what_was_measured_is_stored_for_this_model_and_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = choose(model_with_lora(), [pack_of(20, 50)])
    assert len(list(cache.glob("timings-*.json"))) == 1

    def record(*arguments: Any) -> Any:
        raise AssertionError("a second run must not measure again")

    monkeypatch.setattr(autotune, "_record", record)
    assert choose(model_with_lora(), [pack_of(22, 51)]).fastest == first.fastest
    monkeypatch.setattr(torch, "__version__", "99.0")
    with pytest.raises(AssertionError, match="measure again"):
        choose(model_with_lora(), [pack_of(20, 50)])


def test_a_cache_that_is_damaged_or_cannot_be_written_changes_nothing(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    wanted = choose(model_with_lora(), [pack_of(20, 50)])
    cache.unlink()
    choose(model_with_lora(), [pack_of(20, 50)])
    for stored in cache.glob("timings-*.json"):
        stored.write_text("{")
    assert choose(model_with_lora(), [pack_of(20, 50)]).fastest.keys() == wanted.fastest.keys()


def test_without_a_second_candidate_nothing_is_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_record", None)
    found = choose(model_with_lora(torch.float32), [pack_of(20, 50)])
    assert found.backend(CPU, torch.float32) is TORCH
    assert "float32 on cpu" in found.reason
    assert found.lines() == [f"torch: {found.reason}"]
    assert choose(model_with_lora(), [pack_of(20, 50)], "torch") == KernelChoice("torch")


@pytest.mark.parametrize(("passes", "wanted"), [(60, {"torch"}), (6000, {"compiled", "torch"})])
def test_torch_compile_is_chosen_where_a_run_saves_more_than_it_costs(
    passes: int, wanted: set[str], cache: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "TORCH", clock.backend(TORCH, rms_norm=3e-3, silu_gate=1e-3, rotary=1e-3))
    faster = clock.backend(TORCH, rms_norm=1e-3, silu_gate=2e-3, rotary=1e-3)
    calls: list[None] = []
    monkeypatch.setattr(autotune, "compiled", lambda: calls.append(None) or faster)
    found = choose(model_with_lora(torch.float32), [pack_of(20, 50)], passes=passes)
    assert {name for each, name in found.fastest.items() if each.operation == "rms_norm"} == {"compiled"} & wanted or {
        "torch"
    }
    assert set(found.fastest.values()) == wanted
    assert bool(calls) is (passes > 1000), "compiling takes its time, so it is not tried for a short run"
    assert {name for each, name in found.fastest.items() if each.operation == "silu_gate"} == {"torch"}


# Using ---------------------------------------------------------------------------------------------------------------


def test_a_call_goes_to_the_candidate_of_its_class_or_of_the_nearest() -> None:
    def marked(number: float) -> Backend:
        return Backend(rms_norm=lambda x, gain, eps: torch.full((), number))

    fastest = {
        ShapeClass("rms_norm", (8,), 4): "torch",
        ShapeClass("rms_norm", (8,), 9): "ours",
        ShapeClass("rms_norm", (16,), 4): "ours",
    }
    backend = autotune._dispatching({"ours": marked(1.0), "torch": marked(2.0)}, fastest)

    def computed(rows: int, d: int) -> float:
        return float(backend.rms_norm(torch.zeros(rows, d), torch.zeros(d), 1e-6))

    assert [computed(rows, 8) for rows in (1, 8, 15, 60, 128, 256, 5000)] == [2, 2, 2, 2, 1, 1, 1]
    assert [computed(rows, 16) for rows in (1, 5000)] == [1, 1]
    assert computed(10, 24) == 1, "widths that were not met: what most classes chose"
    assert backend.silu_gate is TORCH.silu_gate


@needs_kernels
def test_a_mixture_of_candidates_is_as_near_to_float32_as_one_of_them() -> None:
    model, pack = model_with_lora(), pack_of(70, 9, 33)
    classes = choose(model, [pack]).fastest
    mixed = {each: ("ours", "torch")[number % 2] for number, each in enumerate(classes)}
    assert set(mixed.values()) == {"ours", "torch"}
    backends = {
        "truth": (model_with_lora(torch.float32), TORCH),
        "torch": (model, TORCH),
        "mixed": (model_with_lora(), KernelChoice("auto", "", mixed).backend(CPU, torch.bfloat16)),
    }
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (each, backend) in backends.items():
        with packed_attention(each, backend):
            made = log_probs(each, pack)
            made.mean().backward()
        gradients = [p.grad.flatten() for p in trainable(each).values() if p.grad is not None]
        found[name] = made.detach(), torch.cat(gradients)
    for right, plain, mixture in zip(found["truth"], found["torch"], found["mixed"], strict=True):
        assert relative_error(mixture, right) <= 1.3 * relative_error(plain, right)


def test_a_choice_is_the_same_after_json() -> None:
    each = ShapeClass("low_rank_linear", (32, 48), 7)
    choice = KernelChoice("auto", "why", {each: "torch"}, {each: Timing(30, {"ours": 12.5, "torch": 8.0})})
    assert KernelChoice.from_json(json.loads(json.dumps(choice.to_json()))) == choice
    assert KernelChoice.from_json(KernelChoice("torch").to_json()) == KernelChoice("torch")


def test_packs_of_every_size_are_represented_by_one_of_middling_length() -> None:
    packs = [pack_of(n) for n in (70, 100, 90, 20, 30)]
    assert [p.ids.numel() for p in autotune.representative(packs)] == [pack_of(90).ids.numel(), pack_of(30).ids.numel()]


def test_dropout_while_calls_are_recorded_draws_nothing_from_the_callers_generator(cache: Path) -> None:
    model = tiny_model("llama").bfloat16()
    attach(model, LoraConfig(r=4, alpha=8, dropout=0.5))
    model.train()
    before = torch.get_rng_state()
    choose(model, [pack_of(20, 50)])
    assert torch.equal(torch.get_rng_state(), before)
