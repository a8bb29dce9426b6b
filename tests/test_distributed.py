"""Several processes: their result is that of one, they end together, and one of them speaks."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import graftlm
import graftlm.run as run_module
import graftlm.training.loop as loop
import graftlm.training.objective as objective
from graftlm import distributed
from graftlm.data.batches.pack import Pack, collate, pack
from graftlm.evaluation.held_out import held_out_loss
from graftlm.model.registry import trainable
from graftlm.optim.adamw import adamw
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.passes import Passes
from graftlm.training.sharding import shard
from graftlm.training.state import TrainingState
from tests.errors import raises
from tests.test_run import recipe
from tests.training.test_loop import examples
from tests.training.together import command_line, together

pytestmark = pytest.mark.usefixtures("without_pictures")

CASES = [
    # method, rows of the step, packed, sharded
    ("lora", 7, True, False),
    ("dora", 7, True, False),
    ("vera", 7, True, False),  # what its sites share stands at the root of the model
    ("adalora", 5, False, False),  # has a penalty, which counts once
    ("lora", 1, True, False),  # all ranks but one have nothing to do
    ("lora", 7, True, True),
    ("dora", 1, True, True),
    ("vera", 7, False, True),
    ("adalora", 5, True, True),
    ("prefix", 5, True, True),
    ("houlsby", 5, True, True),
]


def gradients(method: str, count: int, packed: bool, sharded: bool) -> dict[str, Any]:
    """The loss and the gradients of a step, the held-out loss before it, and what the step says of itself."""
    distributed.start()
    model = perturbed(method, tiny_model())
    distributed.check_same(trainable(model))
    if sharded:
        shard(model)
    rows = examples(count)

    def make(rows: Sequence[Any]) -> list[Pack]:
        return pack(rows, 40, share=True) if packed else [collate([row]) for row in rows]

    gradients_by_name: dict[str, Tensor] = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            gradients_by_name.update(
                {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
            )

    before = held_out_loss(model, rows, pack_tokens=40, packed=packed)
    training = TrainingState(model, {}, Recorder(trainable(model).values(), lr=0.0))
    train_step = loop.TrainStep(training, "supervised", lambda n: 1.0, clip=1e9, passes=Passes(packed=packed))
    step = train_step.step(distributed.packs_of(rows, make, sharded=distributed.is_sharded(model)))
    numbers = {"held_out": before, "loss": step.loss, "norm": step.grad_norm}
    return {"numbers": numbers, "tokens": (step.tokens, step.supervised_tokens), "gradients": gradients_by_name}


def all_gradients() -> list[dict[str, Any]]:
    return [gradients(*case) for case in CASES]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return all_gradients()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_loss_and_every_gradient_are_those_of_one_process(count: int, alone: list[dict[str, Any]]) -> None:
    for number, results in enumerate(together(count, all_gradients)):
        for case, ours, wanted in zip(CASES, results, alone, strict=True):
            for name, value in wanted["numbers"].items():
                assert ours["numbers"][name] == pytest.approx(value, rel=1e-5), (number, case, name)
            assert ours["tokens"] == wanted["tokens"]
            assert ours["gradients"].keys() == wanted["gradients"].keys()
            for name, tensor in wanted["gradients"].items():
                error = float((ours["gradients"][name] - tensor).abs().max() / tensor.abs().max())
                assert error <= 1e-5, (number, case, name, error)


# Whole runs ------------------------------------------------------------------------------------------------------


def whole_runs(base: Path, rows: Path, out: Path) -> list[dict[str, Any]]:
    found = []
    for name, changes in RUNS.items():
        result = graftlm.train(recipe(base, rows, **changes), out / name)
        found.append(result.summary)
    return found


RUNS: dict[str, dict[str, Any]] = {
    "whole": {"train_pack_tokens": 60},
    "sharded": {"train_pack_tokens": 60, "train_shard": "fsdp"},
    "gradients": {"delta_init": "lora-ga"},
}


def test_a_run_leaves_one_folder_and_it_is_that_of_one_process(
    base_folder: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    one = whole_runs(base_folder, rows, tmp_path / "one")
    both = together(2, whole_runs, base_folder, rows, tmp_path / "two")
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(RUNS), "no temporary folder is left"
    for name, mine, first, second in zip(RUNS, one, *both, strict=True):
        ours, wanted = tmp_path / "two" / name, tmp_path / "one" / name
        assert {p.name for p in ours.iterdir()} == {p.name for p in wanted.iterdir()}
        for key, tensor in load_file(wanted / "adapter_model.safetensors").items():
            # Adam divides by the size of the gradient, so an element whose gradient is rounding noise moves freely.
            there = load_file(ours / "adapter_model.safetensors")[key]
            assert torch.allclose(there, tensor, rtol=1e-3, atol=5e-5), (name, key)
        for a, b in zip(
            *((folder / "metrics.jsonl").read_text().splitlines() for folder in (ours, wanted)), strict=True
        ):
            assert json.loads(a)["loss"] == pytest.approx(json.loads(b)["loss"], rel=1e-5)
            assert json.loads(a)["tokens"] == json.loads(b)["tokens"]
        assert (ours / "held_out.jsonl").read_text() == (wanted / "held_out.jsonl").read_text()
        assert first["held_out"] == second["held_out"]
        assert first["held_out"]["loss_nats"] == pytest.approx(mine["held_out"]["loss_nats"], rel=1e-5)
        assert first["train"]["supervised_tokens"] == mine["train"]["supervised_tokens"]
        assert (mine["train"]["ranks"], first["train"]["ranks"]) == (1, 2)
        assert first["base_fingerprint"] == mine["base_fingerprint"]


# Ending together -------------------------------------------------------------------------------------------------


def not_finite_on_rank_1(sharded: bool) -> tuple[str, bool]:
    distributed.start()
    model = perturbed("lora", tiny_model())
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    if sharded:
        shard(model)
    packs = distributed.packs_of(examples(6), lambda rows: pack(rows, 40), sharded=sharded)
    original = objective.log_probs

    def poisoned(*arguments: Any) -> Tensor:
        found = original(*arguments)
        return found * float("nan") if distributed.rank() == 1 else found

    with patch.object(objective, "log_probs", poisoned), raises("training/not-finite") as raised:
        training = TrainingState(model, {}, adamw([(trainable(model).values(), 0.1)], weight_decay=0.0))
        loop.TrainStep(training, "supervised", lambda n: 1.0, clip=1.0).step(packs)
    return str(raised.value), all(torch.equal(p, before[name]) for name, p in trainable(model).items())


def ended_by_the_last_rank(base: Path, rows: Path, out: Path) -> dict[str, Any]:
    distributed.start()

    @contextmanager
    def stop_on_last_rank() -> Iterator[Any]:
        yield SimpleNamespace(requested=distributed.rank() == distributed.count() - 1)

    with patch.object(run_module, "stop_on_signal", stop_on_last_rank):
        return graftlm.train(recipe(base, rows), out).summary


def different_start() -> str:
    distributed.start()
    model = perturbed("lora", tiny_model(), seed=distributed.rank())
    with raises("training/ranks-start-differently") as raised:
        distributed.check_same(trainable(model))
    return str(raised.value)


def prompt_in_parts() -> str:
    distributed.start()
    with raises("training/conflicting-settings") as raised:
        shard(perturbed("prompt", tiny_model()))
    return str(raised.value)


def own_randomness() -> float:
    distributed.start()
    model = perturbed("lora", tiny_model(), dropout=0.5)
    rows = examples(2)
    batch = [collate(rows)]
    torch.rand(7 + distributed.rank())
    training = TrainingState(model, {}, torch.optim.SGD(trainable(model).values(), lr=0.0))
    loop.TrainStep(training, "supervised", lambda n: 1.0, clip=1.0).step(batch)
    return float(torch.initial_seed())


def endings(base: Path, rows: Path, out: Path) -> list[Any]:
    return [
        not_finite_on_rank_1(False),
        not_finite_on_rank_1(True),
        ended_by_the_last_rank(base, rows, out / "ended"),
        different_start(),
        prompt_in_parts(),
        own_randomness(),
    ]


def test_what_ends_one_rank_ends_all_and_nobody_waits(
    base_folder: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    wanted = own_randomness()
    of_rank_1 = {examples(6)[i].where for i in distributed.deal([len(e) for e in examples(6)], 2)[1]}
    results = together(2, endings, base_folder, rows, tmp_path)
    for plain, sharded, summary, differs, refused, _ in results:
        for message, unchanged in (plain, sharded):
            assert {line.strip() for line in message.splitlines() if ".jsonl" in line} == of_rank_1
            assert unchanged
        assert summary["interrupted"] is True
        assert summary["train"]["steps"] == 1
        assert f"{next(iter(trainable(perturbed('lora', tiny_model()))))} starts otherwise on rank 1" in differs
        assert "shard: none" in refused
    assert load_file(tmp_path / "ended" / "adapter_model.safetensors")
    assert results[0][-1] == wanted
    assert results[1][-1] != wanted


def spoken(base: Path, rows: Path, out: Path) -> list[tuple[int, str, str]]:
    words = ["train", str(out / "recipe.yaml"), "--out"]
    return [
        command_line(*words, str(out / "said")),
        command_line(*words, str(out / "lost"), "base.name=/no/such/base"),
    ]


@pytest.mark.slow
def test_the_command_line_speaks_once(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    made = {"base": {"name": str(base_folder)}, "data": {"train": str(rows), "held_out": 2}, "train": {"steps": 2}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(made | {"report": {"max_new_tokens": 2}}))
    first, second = together(2, spoken, base_folder, rows, tmp_path)
    assert first[0][0] == second[0][0] == 0, first[0][2] + second[0][2]
    assert "wrote" in first[0][1]
    assert second[0][1:] == ("", "")
    assert first[1][0] == second[1][0] == 1
    assert sorted(["no such folder" in first[1][2], "no such folder" in second[1][2]]) == [False, True]


# Dealing, and what is kept on disk -------------------------------------------------------------------------------


def test_rows_are_dealt_once_evenly_and_by_their_lengths_alone() -> None:
    generator = random.Random(0)
    for count in (1, 2, 3, 8):
        sizes = [generator.randint(1, 1000) for _ in range(40)]
        shares = distributed.deal(sizes, count)
        assert sorted(i for share in shares for i in share) == list(range(40))
        assert shares == distributed.deal(list(sizes), count)
        loads = [sum(sizes[i] for i in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes)
    assert distributed.deal([5, 9, 7], 1) == [[0, 1, 2]]
    assert distributed.deal([5], 3) == [[0], [], []]


def go_on(base: Path, rows: Path, out: Path) -> None:
    distributed.start()
    graftlm.train(recipe(base, rows), out, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_a_run_that_one_number_of_ranks_began_another_ends(
    first: int, base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    whole = graftlm.train(recipe(base_folder, rows), tmp_path / "whole").folder
    out = tmp_path / "out"
    together(first, ended_by_the_last_rank, base_folder, rows, out)
    assert (
        json.loads((out / "summary.json").read_text())["train"] | {"steps": 1, "ranks": first}
        == (json.loads((out / "summary.json").read_text())["train"])
    )
    together(3 - first, go_on, base_folder, rows, out)
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (out, whole))
    assert found.keys() == wanted.keys()
    assert all((found[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max() for name, tensor in wanted.items())
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
