"""What holds for every callback: it is in the table, says what it is, and acts at its place in a step."""

import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import graftlm.callbacks as callbacks
from graftlm.config.schema import build
from graftlm.data.batches.pack import collate
from graftlm.model.registry import attachment, trainable
from graftlm.recipe import Recipe
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback, make_optimizer
from graftlm.training.loop import Step, TrainStep
from graftlm.training.state import ParameterGroup, TrainingState
from tests.callbacks.tables import TABLE, with_optimizer
from tests.errors import raises
from tests.training.test_loop import examples

FOLDERS = (Path(callbacks.__file__).parent, Path(callbacks.__file__).parents[1] / "optim")


def training(model: Any, chosen: list[Callback], *, rate: float = 0.01, total: int = 4) -> TrainingState:
    groups = [ParameterGroup(trainable(model), rate)]
    optimizer = make_optimizer(with_optimizer(chosen), groups, weight_decay=0.0)
    return TrainingState(model, attachment(model).configs, optimizer, total=total, seed=3)


def walk(
    state: TrainingState, chosen: list[Callback], batches: list[Any], *, clip: float = 1e9, **options: Any
) -> Iterator[Step]:
    state.seen = state.done
    yield from TrainStep(state, "supervised", lambda step: 1.0, clip, chosen, **options).over(batches)


def run(state: TrainingState, chosen: list[Callback], batches: list[Any], **options: Any) -> list[Step]:
    return list(walk(state, chosen, batches, **options))


def test_every_file_is_in_the_table() -> None:
    files = {file.stem for folder in FOLDERS for file in folder.glob("*.py")} - {"__init__"}
    assert {row.callback.__module__.rpartition(".")[2] for row in TABLE.values()} == files
    for name, row in TABLE.items():
        assert row.config.__dataclass_fields__["name"].default == name
        assert "arXiv:" in row.callback.paper or "http" in row.callback.paper
        assert row.callback.cost
        assert row.callback.paper.split("arXiv:")[-1] in (import_module(row.callback.__module__).__doc__ or "")


class Watching(Callback):
    """Notes what it is called for, and what stands in the tensors then."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__(None)
        self.said = calls

    def note(self, what: str, state: TrainingState) -> None:
        parameter = next(iter(state.parameters().values()))
        self.said.append((what, state.done, parameter.grad is not None, parameter.detach().clone()))

    def on_start(self, training: TrainingState) -> None:
        self.note("start", training)

    def on_grads(self, training: TrainingState) -> None:
        self.note("grads", training)

    def on_step(self, training: TrainingState) -> None:
        self.note("step", training)
        training.events.append({"event": "watched"})


def test_a_callback_is_called_at_its_places() -> None:
    model, calls = perturbed("lora", tiny_model()), []
    watching = Watching(calls)
    state = training(model, [])
    done = run(state, [watching], [[collate(examples())]] * 2)
    assert [(what, number, graded) for what, number, graded, _ in calls] == [
        ("start", 0, False), ("grads", 0, True), ("step", 1, True), ("grads", 1, True), ("step", 2, True),
    ]  # fmt: skip
    assert torch.equal(calls[0][3], calls[1][3])
    assert not torch.equal(calls[1][3], calls[2][3])
    assert [step.events for step in done] == [({"event": "watched"},)] * 2


def test_randomness_depends_on_seed_step_and_purpose_alone() -> None:
    state = training(perturbed("lora", tiny_model()), [])
    first = torch.rand(3, generator=state.generator("a"))
    torch.rand(5)
    assert torch.equal(first, torch.rand(3, generator=state.generator("a")))
    assert not torch.equal(first, torch.rand(3, generator=state.generator("b")))
    state.done = 1
    assert not torch.equal(first, torch.rand(3, generator=state.generator("a")))


def read(**sections: Any) -> Recipe:
    return build(Recipe, {"data": {"train": "rows.jsonl"}} | sections, source="test")


@pytest.mark.parametrize("value", ["lora-plus", ["lora-plus"], {"name": "lora-plus"}, [{"name": "lora-plus"}]])
def test_a_recipe_names_callbacks_with_or_without_options(value: Any) -> None:
    (found,) = read(callbacks=value).callbacks
    assert found == TABLE["lora-plus"].config()


@pytest.mark.parametrize("value", ["galore", {"name": "galore"}, {"name": "galore", "rank": 128}])
def test_a_recipe_names_its_optimizer_with_or_without_options(value: Any) -> None:
    assert read(optimizer=value).optimizer == TABLE["galore"].config()
    assert read().optimizer == TABLE["adamw"].config()


@pytest.mark.parametrize(
    ("sections", "code", "says"),
    [
        ({"callbacks": "lora-pluss"}, "recipe/invalid-value", "Did you mean 'lora-plus'"),
        ({"callbacks": [{"name": "lora-plus", "ratios": 3}]}, "recipe/unknown-key", "ratio"),
        ({"callbacks": ["lora-plus", "lora-plus"]}, "recipe/invalid-value", "listed twice"),
        ({"callbacks": ["ema", "lomo"]}, "recipe/invalid-value", "write `optimizer: lomo`"),
        ({"optimizer": "galor"}, "recipe/invalid-value", "Did you mean 'galore'"),
        ({"optimizer": {"rank": 3}}, "recipe/invalid-value", "name"),
        ({"optimizer": "ema"}, "recipe/invalid-value", r"write `callbacks: \[ema\]`"),
        ({"optimizer": ["lomo"]}, "recipe/invalid-value", "optimizer"),
        ({"policies": ["ema"]}, "recipe/unknown-key", "optimizer, .* and callbacks"),
        ({"online": {"scorer": {"by": "exact"}}}, "recipe/unknown-key", "rl"),
    ],
)
def test_what_a_recipe_may_not_say_of_them(sections: dict[str, Any], code: str, says: str) -> None:
    with raises(code, match=says):
        read(**sections)


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been() -> None:
    rows, bad = [[collate(examples(seed=n))] for n in range(3)], collate(examples(seed=9))
    bad.weights[0] = math.inf
    found = []
    for batches in (rows, [rows[0], [bad], rows[1], [bad], [bad], rows[2]]):
        model = perturbed("lora", tiny_model(), dropout=0.3)
        state = training(model, [])
        steps = run(state, [], batches, on_nonfinite="skip")
        moments = [state_of_p[key] for state_of_p in state.optimizer.state.values() for key in sorted(state_of_p)]
        found.append(([p.detach().clone() for p in trainable(model).values()], moments))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert [step.skipped != "" for step in steps] == [False, True, False, True, True, False]
    assert "rows.jsonl:1" in steps[1].rows
    assert [step.done for step in steps] == [1, 1, 2, 2, 2, 3]


def test_three_in_a_row_that_are_not_finite_stop() -> None:
    bad = collate(examples())
    bad.weights[0] = math.nan
    state = training(perturbed("lora", tiny_model()), [])
    with raises("training/not-finite", match="3 such steps in a row"):
        run(state, [], [[bad]] * 5, on_nonfinite="skip")
