"""What holds for every policy: it is in the table, says what it is, and acts at its place in a step."""

import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import graftlm.callbacks as policies
from graftlm.callbacks import POLICIES
from graftlm.config.schema import build
from graftlm.data.batches.pack import collate
from graftlm.errors import RecipeError, TrainingError
from graftlm.model.layers.registry import attachment, trainable
from graftlm.recipe import Recipe
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import ParameterGroup, Policy, Training
from graftlm.training.loop import Step, steps
from tests.training.test_loop import examples

FOLDERS = (Path(policies.__file__).parent, Path(policies.__file__).parents[1] / "optim")


def training(model: Any, chosen: list[Policy], *, rate: float = 0.01, total: int = 4) -> Training:
    groups = [ParameterGroup(trainable(model), rate)]
    optimiser = policies.make_optimiser(chosen, groups, weight_decay=0.0)
    return Training(model, attachment(model).configs, optimiser, total=total, seed=3)


def walk(
    state: Training, chosen: list[Policy], batches: list[Any], *, clip: float = 1e9, **options: Any
) -> Iterator[Step]:
    return steps(
        state.model, batches, loss="supervised", optimiser=state.optimiser, schedule=lambda step: 1.0, clip=clip,
        policies=chosen, training=state, seen=state.done, **options,
    )  # fmt: skip


def run(state: Training, chosen: list[Policy], batches: list[Any], **options: Any) -> list[Step]:
    return list(walk(state, chosen, batches, **options))


def test_every_file_is_in_the_table() -> None:
    files = {file.stem for folder in FOLDERS for file in folder.glob("*.py")} - {"__init__"}
    assert {row.policy.__module__.rpartition(".")[2] for row in POLICIES.values()} == files
    for name, row in POLICIES.items():
        assert row.config.__dataclass_fields__["name"].default == name
        assert "arXiv:" in row.policy.paper or "http" in row.policy.paper
        assert row.policy.cost
        assert row.policy.paper.split("arXiv:")[-1] in (import_module(row.policy.__module__).__doc__ or "")


class Watching(Policy):
    """Notes what it is called for, and what stands in the tensors then."""

    def __init__(self, said: list[Any]) -> None:
        super().__init__(None)
        self.said = said

    def note(self, what: str, state: Training) -> None:
        parameter = next(iter(state.parameters().values()))
        self.said.append((what, state.done, parameter.grad is not None, parameter.detach().clone()))

    def on_start(self, training: Training) -> None:
        self.note("start", training)

    def on_grads(self, training: Training) -> None:
        self.note("grads", training)

    def on_step(self, training: Training) -> None:
        self.note("step", training)
        training.events.append({"event": "watched"})


def test_a_policy_is_called_at_its_places() -> None:
    model, said = perturbed("lora", tiny_model()), []
    watching = Watching(said)
    state = training(model, [])
    done = run(state, [watching], [[collate(examples())]] * 2)
    assert [(what, number, graded) for what, number, graded, _ in said] == [
        ("start", 0, False), ("grads", 0, True), ("step", 1, True), ("grads", 1, True), ("step", 2, True),
    ]  # fmt: skip
    assert torch.equal(said[0][3], said[1][3])
    assert not torch.equal(said[1][3], said[2][3])
    assert [step.events for step in done] == [({"event": "watched"},)] * 2


def test_randomness_depends_on_seed_step_and_purpose_alone() -> None:
    state = training(perturbed("lora", tiny_model()), [])
    first = torch.rand(3, generator=state.generator("a"))
    torch.rand(5)
    assert torch.equal(first, torch.rand(3, generator=state.generator("a")))
    assert not torch.equal(first, torch.rand(3, generator=state.generator("b")))
    state.done = 1
    assert not torch.equal(first, torch.rand(3, generator=state.generator("a")))


def test_two_optimisers_in_a_run_are_refused() -> None:
    class Own(Policy):
        def optimiser(self, groups: Any, *, weight_decay: float) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for group in groups for p in group.parameters.values()], lr=0.1)

    one, other = Own(POLICIES["lora-plus"].config()), Own(POLICIES["lora-plus"].config())
    other.config = type("Other", (), {"name": "other"})
    with pytest.raises(TrainingError, match="a run has one"):
        policies.make_optimiser(
            [one, other], [ParameterGroup(trainable(perturbed("lora", tiny_model())), 0.1)], weight_decay=0
        )


def tree(given: Any) -> dict[str, Any]:
    return {"data": {"train": "rows.jsonl"}, "policies": given}


def test_a_recipe_names_policies_with_or_without_options() -> None:
    for given in ("lora-plus", ["lora-plus"], {"name": "lora-plus"}, [{"name": "lora-plus", "ratio": 16.0}]):
        (found,) = build(Recipe, tree(given), source="test").policies
        assert found == POLICIES["lora-plus"].config(ratio=16.0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("lora-pluss", "Did you mean 'lora-plus'"),
        ([{"name": "lora-plus", "ratios": 3}], "ratio"),
        (["lora-plus", "lora-plus"], "twice"),
    ],
)
def test_what_a_recipe_may_not_say_of_policies(given: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        build(Recipe, tree(given), source="test")


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been() -> None:
    rows, bad = [[collate(examples(seed=n))] for n in range(3)], collate(examples(seed=9))
    bad.weights[0] = math.inf
    found = []
    for batches in (rows, [rows[0], [bad], rows[1], [bad], [bad], rows[2]]):
        model = perturbed("lora", tiny_model(), dropout=0.3)
        state = training(model, [])
        said = run(state, [], batches, on_nonfinite="skip")
        moments = [kept[key] for kept in state.optimiser.state.values() for key in sorted(kept)]
        found.append(([p.detach().clone() for p in trainable(model).values()], moments))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert [step.skipped != "" for step in said] == [False, True, False, True, True, False]
    assert "rows.jsonl:1" in said[1].rows
    assert [step.done for step in said] == [1, 1, 2, 2, 2, 3]


def test_three_in_a_row_that_are_not_finite_stop() -> None:
    bad = collate(examples())
    bad.weights[0] = math.nan
    state = training(perturbed("lora", tiny_model()), [])
    with pytest.raises(TrainingError, match="3. step in a row"):
        run(state, [], [[bad]] * 5, on_nonfinite="skip")
