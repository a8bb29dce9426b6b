"""The loop: the loss is what it says, splits change nothing, and what must not go on stops with a reason."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError

import graftlm.training.loop as loop
import graftlm.training.objective as objective
from graftlm.data.batches.pack import Example, collate, pack
from graftlm.deltas.lora import LoraConfig
from graftlm.losses import LOSSES, Batch, LossSum
from graftlm.model.attach import attach
from graftlm.model.registry import trainable
from graftlm.optim.adamw import adamw
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.config import TrainConfig
from graftlm.training.passes import Passes
from graftlm.training.schedule import learning_rate_factor, warmup_cosine
from graftlm.training.state import TrainingState
from tests.errors import raises


def examples(count: int = 8, seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(random.integers(5, 30))
        weights = np.zeros(length, np.float32)
        weights[int(random.integers(1, length)) :] = 1
        made.append(Example(random.integers(3, 300, length).astype(np.int32), weights, f"rows.jsonl:{number + 1}"))
    return made


def run(
    model: Any, batches: Sequence[Any], *, lr: float = 0.01, packed: bool = True, checkpointing: bool = False
) -> list[loop.Step]:
    optimizer = adamw([(trainable(model).values(), lr)], weight_decay=0.0)
    schedule = warmup_cosine(steps=len(batches), warmup_steps=0)
    passes = Passes(packed=packed, checkpointing=checkpointing)
    train_step = loop.TrainStep(TrainingState(model, {}, optimizer), "supervised", schedule, clip=1e9, passes=passes)
    return list(train_step.over(batches))


def gradients(
    batch: Any, monkeypatch: pytest.MonkeyPatch, *, packed: bool = True
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and every gradient of one step, caught before the optimizer forgets them."""
    model = perturbed("lora", tiny_model())
    gradients_by_name: dict[str, torch.Tensor] = {}
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: gradients_by_name.update(
            {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
        ))  # fmt: skip
        (step,) = run(model, [batch], packed=packed)
    return step.loss, gradients_by_name


def equal(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (ours[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name


def test_one_batch_of_eight_is_eight_accumulated_of_one_and_any_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = examples()
    whole_loss, whole = gradients([collate(rows)], monkeypatch)
    for batch in ([collate([r]) for r in rows], pack(rows, 40), [collate(rows[:3]), collate(rows[3:])]):
        loss, found = gradients(batch, monkeypatch)
        assert math.isclose(loss, whole_loss, rel_tol=1e-5)
        equal(found, whole)


def test_rows_that_share_beginnings_give_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    start = examples(1, seed=4)[0].ids.repeat(2)
    rows = [
        Example(
            np.concatenate([start, row.ids]), np.concatenate([0 * start, row.weights]).astype(np.float32), row.where
        )
        for row in examples()
    ]
    apart_loss, apart = gradients(pack(rows, 100), monkeypatch)
    for tokens in (60, 100, 1000):
        batch = pack(rows, tokens, share=True)
        assert sum(part.ids.numel() for part in batch) < sum(map(len, rows))
        loss, found = gradients(batch, monkeypatch)
        assert math.isclose(loss, apart_loss, rel_tol=1e-5)
        equal(found, apart)


def test_one_row_at_a_time_without_packed_attention_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = examples()
    whole_loss, whole = gradients([collate(rows)], monkeypatch)
    loss, found = gradients([collate([r]) for r in rows], monkeypatch, packed=False)
    assert math.isclose(loss, whole_loss, rel_tol=1e-5)
    equal(found, whole)


def test_the_loss_and_gradients_are_those_of_transformers_own_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = examples()
    ours_loss, ours = gradients(pack(rows, 50), monkeypatch)
    model = perturbed("lora", tiny_model())
    total, count = torch.zeros(()), 0
    for row in rows:
        labels = torch.from_numpy(np.where(row.weights > 0, row.ids, -100).astype(np.int64))[None]
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        trained = int((labels[:, 1:] != -100).sum())
        total, count = total + model(input_ids=ids, labels=labels).loss * trained, count + trained
    (total / count).backward()
    assert math.isclose(ours_loss, float(total.detach()) / count, rel_tol=1e-5)
    equal(ours, {name: p.grad for name, p in trainable(model).items() if p.grad is not None})


def test_a_delta_learns_what_it_is_shown() -> None:
    model = tiny_model(initializer_range=0.3)
    attach(model, LoraConfig(r=8, alpha=16))
    done = run(model, [pack(examples(4), 64)] * 60, lr=0.02)
    assert done[-1].loss < 0.2 * done[0].loss


def test_steps_count_what_they_did() -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=2))
    rows = examples(3)
    (step,) = run(model, [pack(rows, 64)])
    assert step.tokens == sum(map(len, rows))
    assert step.computed_tokens == sum(len(row.needed) for row in rows)
    assert step.supervised_tokens == sum(float(r.weights.sum()) for r in rows)
    assert step.number == 1


def test_a_loss_that_is_not_finite_names_its_rows_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturbed("lora", tiny_model())
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    rows = examples(4)
    packs = pack(rows, 10_000)
    (bad,) = packs[0].where[2]
    start = sum(packs[0].lengths[:2])

    original = objective.log_probs

    def poisoned(model: Any, pack: Any) -> torch.Tensor:
        found = original(model, pack)
        inside = (pack.hidden_rows >= start) & (pack.hidden_rows < start + packs[0].lengths[2])
        return torch.where(inside, float("nan"), found)

    monkeypatch.setattr(objective, "log_probs", poisoned)
    with raises("training/not-finite") as raised:
        run(model, [packs])
    message = str(raised.value)
    assert bad in message
    assert "learning_rate" in message
    assert not any(row.where in message for row in rows if row.where != bad)
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())


def test_a_gradient_that_is_not_finite_stops_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturbed("lora", tiny_model())
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    first = next(iter(trainable(model).values()))
    first.register_hook(lambda grad: grad * float("inf"))
    with raises("training/not-finite", match=r"gradient of step 1 [\s\S]*rows.jsonl:1"):
        run(model, [pack(examples(2), 64)])
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())


def test_a_trainable_tensor_without_gradient_is_named() -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=2))
    model.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(2)))
    with raises("training/no-gradient", match=r"1 trainable tensors .*\n  forgotten"):
        run(model, [pack(examples(2), 64)])


def test_a_tensor_that_only_ever_has_zero_gradients_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=2))
    dead = torch.nn.Parameter(torch.zeros(()))
    model.register_parameter("dead", dead)

    def value(config: Any, policy: torch.Tensor, reference: Any, batch: Batch) -> LossSum:
        return LossSum(-(batch.weights * policy).sum() + 0 * dead, batch.weights.sum())

    monkeypatch.setitem(LOSSES, "supervised", replace(LOSSES["supervised"], value=value))
    with raises("training/zero-gradient", match="dead"):
        run(model, [pack(examples(2), 64)] * 3)


def test_the_gradient_is_clipped_over_all_tensors_together() -> None:
    model = perturbed("lora", tiny_model())
    norms = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            norms.append(
                float(torch.cat([p.grad.flatten() for p in trainable(model).values() if p.grad is not None]).norm())
            )

    optimizer = Recorder(trainable(model).values(), lr=1.0)
    train_step = loop.TrainStep(TrainingState(model, {}, optimizer), "supervised", lambda n: 1.0, clip=1e-3)
    step = train_step.step(pack(examples(4), 64))
    assert step.grad_norm > 1e-3
    assert math.isclose(norms[0], 1e-3, rel_tol=1e-3)


def test_the_schedule_rises_then_falls_to_zero() -> None:
    factor = warmup_cosine(steps=100, warmup_steps=10)
    values = [factor(n) for n in range(100)]
    assert all(a < b for a, b in zip(values[:10], values[1:11], strict=True))
    assert values[10] == 1.0
    assert all(a > b for a, b in zip(values[10:], values[11:], strict=False))
    assert values[0] > 0
    assert math.isclose(values[55], 0.5, abs_tol=1e-9)
    assert factor(100) == 0.0


@pytest.mark.parametrize("warmup_steps", [0, 7])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "warmup-stable-decay"])
def test_schedules_are_those_of_transformers_after_the_warm_up(name: Any, warmup_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made = {
        "cosine": lambda: transformers.get_cosine_schedule_with_warmup(optimizer, warmup_steps, 60),
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, warmup_steps, 60),
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, warmup_steps),
        "warmup-stable-decay": lambda: transformers.get_wsd_schedule(
            optimizer, warmup_steps, 12, num_stable_steps=48 - warmup_steps, decay_type="linear"
        ),
    }
    (wanted,) = made[name]().lr_lambdas
    factor = learning_rate_factor(name, steps=60, warmup_steps=warmup_steps, decay_steps=12)
    for step in range(warmup_steps, 61):
        assert math.isclose(factor(step), wanted(step) if name != "constant" else 1.0, abs_tol=1e-12), step
    assert [factor(step) for step in range(warmup_steps)] == [
        pytest.approx((step + 1) / (warmup_steps + 1)) for step in range(warmup_steps)
    ]


def test_a_decay_that_nothing_reads_and_shares_over_the_whole_are_refused() -> None:
    with pytest.raises(ValidationError, match="decay is for schedule: warmup-stable-decay; schedule: cosine"):
        TrainConfig(decay=0.1)
    with pytest.raises(ValidationError, match="warmup 0.5 and decay 0.6 are more than the whole run"):
        TrainConfig(schedule="warmup-stable-decay", warmup=0.5, decay=0.6)
    factor = TrainConfig(schedule="warmup-stable-decay", warmup=0.0).factor(100)
    assert [factor(step) for step in (0, 79, 80, 90, 99)] == pytest.approx([1, 1, 1, 0.5, 0.05])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_memory_that_runs_out_is_explained(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*args: Any) -> Any:
        raise error

    model = perturbed("lora", tiny_model())
    monkeypatch.setattr(objective, "log_probs", greedy)
    packs = [collate(examples(3)), collate(examples(1))]
    with raises("training/out-of-memory") as raised:
        run(model, [packs])
    message = str(raised.value)
    assert f"largest pack has {packs[0].ids.numel()} tokens in 3 rows, {len(packs[0].targets)} of them" in message
    assert "every one of 2 layers keeps what it computed" in message
    for knob in ("train.checkpointing", "train.pack_tokens", "base.dtype", "graft estimate"):
        assert knob in message
    with raises("training/out-of-memory", match=r"keeps its input until[\s\S]*lower data.max_tokens") as raised:
        run(model.bfloat16(), [[collate(examples(1))]], checkpointing=True)
    assert "train.checkpointing" not in str(raised.value)
    assert "base.dtype" not in str(raised.value)


def test_another_error_of_the_runtime_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(objective, "log_probs", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        run(perturbed("lora", tiny_model()), [[collate(examples(1))]])


def test_a_step_with_checkpointing_is_a_step_without() -> None:
    done = [run(perturbed("lora", tiny_model()), [pack(examples(), 60)] * 3, checkpointing=on) for on in (False, True)]
    for with_, without in zip(done[1], done[0], strict=True):
        assert math.isclose(with_.loss, without.loss, rel_tol=1e-6)
        assert math.isclose(with_.grad_norm, without.grad_norm, rel_tol=1e-5)
