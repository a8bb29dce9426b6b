"""`statistics: {rows: FILE}`: what inits and methods look at before training, in place of the first training rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graftlm
from graftlm.data.batches.pack import Example
from graftlm.hub.load import load_base
from graftlm.model.registry import trainable
from graftlm.prepare import prepare_data
from graftlm.training.checkpoints import FACTS
from graftlm.training.phases import attach_deltas, make_batches
from tests.errors import raises
from tests.training.test_preferences import written
from tests.training.test_resume import recipe, rows, same, stopping_after

__all__ = ["rows"]

pytestmark = pytest.mark.usefixtures("without_pictures")

STARTS: dict[str, dict[str, Any]] = {
    "second moments": {"method": "lora", "r": 4, "init": "eva"},
    "gradients": {"method": "lora", "r": 4, "init": "lora-ga"},
}
STEPS = {"train__steps": 4, "train__pack_tokens": 512}
"""A pack for each step, so that the first packs of training are those of all four steps."""


def lines(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text().splitlines()]


def started(made: Any) -> dict[str, torch.Tensor]:
    """The deltas before the first step."""
    model, tokenizer = load_base(made.base)
    data = prepare_data(made, tokenizer)
    batches = make_batches(made.train, data.examples)
    attach_deltas(made.setup(), model, data.examples, batches, statistics_rows=data.statistics_rows)
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def in_order(made: Any, rows: Path) -> list[dict[str, Any]]:
    """The rows of the file in the order in which the steps train on them."""
    data = prepare_data(made, made.tokenizer())
    examples = [data.examples[i] for batch in make_batches(made.train, data.examples) for i in batch]
    numbers = [int(example.where.rpartition(":")[2]) for example in examples if isinstance(example, Example)]
    return [lines(rows)[number - 1] for number in numbers]


@pytest.mark.parametrize("start", STARTS)
def test_the_rows_of_the_first_packs_give_the_default_start_and_others_another(
    start: str, base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    plain = recipe(base_folder, rows, delta=STARTS[start], **STEPS)
    wanted = started(plain)
    first = written(tmp_path / "first.jsonl", in_order(plain, rows))
    statistics = started(recipe(base_folder, rows, delta=STARTS[start], statistics={"rows": str(first)}, **STEPS))
    assert statistics.keys() == wanted.keys()
    assert all(torch.equal(statistics[name], tensor) for name, tensor in wanted.items())
    fields = [{"prompt": f"what is {n}?", "completion": f"{n} and {n}"} for n in range(5)]
    other = written(tmp_path / "other.jsonl", fields)
    found = started(recipe(base_folder, rows, delta=STARTS[start], statistics={"rows": str(other)}, **STEPS))
    assert any(not torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_every_named_row_counts(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    """Twenty packs, of which the last alone says something else."""
    made = [{"prompt": "say red", "completion": "red"}] * 19
    found = []
    for last in ("red", "seven green apples"):
        file = written(tmp_path / f"{last}.jsonl", [*made, {"prompt": "say it", "completion": last}])
        own = {"statistics": {"rows": {"path": str(file), "format": "prompt-completion"}}, "train__batch_rows": 1}
        found.append(started(recipe(base_folder, rows, delta=STARTS["gradients"], **own)))
    assert any(not torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_a_run_knows_its_statistics_rows_and_goes_on_to_the_same_bytes(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "named.jsonl", lines(rows)[:6])
    made = recipe(base_folder, rows, delta=STARTS["second moments"], statistics={"rows": str(file)})
    graftlm.train(made, tmp_path / "whole")
    for name in ("out", "edited"):
        with monkeypatch.context() as patch:
            stopping_after(3, patch)
            graftlm.train(made, tmp_path / name)
    facts = json.loads((tmp_path / "out" / "checkpoints" / "step-00000003" / FACTS).read_text())
    assert len(facts["statistics_rows"]) == 64
    graftlm.train(made, tmp_path / "out", resume=True)
    same(tmp_path / "out", tmp_path / "whole")
    written(file, lines(rows)[:5])
    with raises("training/dependencies-changed", match="rows for statistics: .* edited"):
        graftlm.train(made, tmp_path / "edited", resume=True)


def test_it_is_refused_where_nothing_gathers_statistics(base_folder: Path, rows: Path) -> None:
    with raises("recipe/invalid-value", match="init of .*eva"):
        recipe(base_folder, rows, statistics={"rows": str(rows)})
    with raises("recipe/unknown-key", match="row"):
        recipe(base_folder, rows, delta=STARTS["gradients"], statistics={"row": str(rows)})


def test_rows_that_cannot_be_used_are_named(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "named.jsonl", [{"prompt": "say red", "completion": "red"}, {"prompt": "say"}])
    made = recipe(base_folder, rows, delta=STARTS["gradients"], statistics={"rows": str(file)})
    data = prepare_data(made, made.tokenizer())
    assert len(data.statistics_rows) == 1
    assert any("named.jsonl:2" in line for line in [*data.report.problems, *data.report.notes])
