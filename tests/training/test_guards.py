"""Guards see what they are there for, and are quiet otherwise."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graftlm
import graftlm.training.guards as guards_module
import graftlm.training.objective as objective
from graftlm.config.schema import build
from graftlm.recipe import Recipe
from graftlm.training.guards import EarlyStopping, Guards
from tests.errors import raises
from tests.training.test_resume import recipe, rows, same, stopping_after  # noqa: F401

pytestmark = pytest.mark.usefixtures("without_pictures")


def falling(steps: int, seed: int, spread: float) -> Iterator[float]:
    """Losses as of a run: falling, and spread from batch to batch as a log-normal number."""
    draw = random.Random(seed)
    for step in range(steps):
        yield (1.0 + 2.5 * 0.998**step) * draw.lognormvariate(0, spread)


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.2])
def test_a_spike_is_seen_at_once_and_clean_steps_are_quiet(spread: float) -> None:
    for seed in range(10):
        guards = Guards(None, [])
        clean = list(falling(2_000, seed, spread))
        assert [guards.spike(loss) for loss in clean] == [None] * 2_000
        event = guards.spike(10 * clean[-1])
        assert event is not None
        assert event["event"] == "spike"
        assert guards.spike(clean[-1]) is None, "a spike is not what is usual from then on"


def test_what_a_guard_remembers_is_read_from_the_log() -> None:
    lines: list[dict[str, Any]] = [{"step": n, "loss": loss} for n, loss in enumerate(falling(40, 0, 0.1))]
    lines.insert(7, {"step": 7, "event": "held out", "held_out_loss": 2.0})
    lines += [{"step": 40, "event": "held out", "held_out_loss": 2.5}]
    again = Guards(EarlyStopping(patience=1), lines)
    assert again.best == 2.0
    assert again.ended
    assert again.spike(30.0) is not None


def test_tensors_that_stand_still_and_memory_that_grows_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([1.0, 1.2, 3.0, 3.1])
    monkeypatch.setattr(guards_module, "memory_gib", lambda: next(held))
    guards = Guards(None, [])
    tensors = {"moves": torch.zeros(3), "stands": torch.ones(3)}
    events = []
    for look in range(4):
        tensors["moves"] += 1
        events += [(look, event["event"], event.get("tensors")) for event in guards.look(tensors)]
    assert events == [
        (1, "stalled", ["stands"]), (2, "stalled", ["stands"]),
        (2, "memory grows", None), (3, "stalled", ["stands"]),
    ]  # fmt: skip


def spiking_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss that is told of that batch is ten times what it is."""
    real = objective.Sums.totals
    seen = 0

    def totals(self: Any) -> Any:
        nonlocal seen
        loss, metrics = real(self)
        seen += 1
        return (loss * 10 if seen == step else loss), metrics

    monkeypatch.setattr(objective.Sums, "totals", totals)


def events(out: Path) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "event" in line]


def test_after_a_spike_a_run_may_return_to_its_last_checkpoint(
    base_folder: Path,
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = recipe(base_folder, rows, train__steps=14, train__save_every=5, train__on_spike="return")
    with monkeypatch.context() as patch:
        spiking_at(12, patch)
        graftlm.train(made, tmp_path / "out")
    (spike,) = events(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<td>spike</td>" in page
    assert "returns to: 10" in page
    assert (spike["step"], spike["returns_to"]) == (12, 10)
    # batches 11 and 12 are as if they had not been: the optimizer has done 12 steps
    facts = json.loads((tmp_path / "out" / "checkpoints" / "step-00000014" / "state.json").read_text())
    assert (facts["seen"], facts["done"]) == (14, 12)
    rates = [line["learning_rate"] for line in lines(tmp_path / "out") if "loss" in line]
    assert rates[12] == rates[10]


def lines(out: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))


def test_early_stopping_keeps_the_state_with_the_lowest_held_out_loss(
    base_folder: Path,
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopping = {"every": 1, "patience": 2}
    made = recipe(base_folder, rows, train__steps=30, train__learning_rate=0.3, train__early_stopping=stopping)
    result = graftlm.train(made, tmp_path / "out")
    losses = [event["held_out_loss"] for event in events(tmp_path / "out")]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 30, "two measurements that were no better end the run"
    assert "interrupted" not in result.summary
    assert result.summary["held_out"]["loss_nats"]["tuned"] == pytest.approx(losses[best], rel=1e-5)
    with monkeypatch.context() as patch:
        for after in (best + 1, 1):
            stopping_after(after, patch)
            graftlm.train(made, tmp_path / "again", resume=True)
    graftlm.train(made, tmp_path / "again", resume=True)
    same(tmp_path / "again", tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "train", "says"),
    [({}, {}, "held-out rows"), ({"held_out": 2}, {"in_turn": True}, "in_turn")],
)
def test_early_stopping_needs_rows_and_one_end(data: dict[str, Any], train: dict[str, Any], says: str) -> None:
    tree = {"data": {"train": "rows.jsonl", **data}, "train": {"early_stopping": {}, **train}}
    with raises("recipe/invalid-value", match=says):
        build(Recipe, tree, source="test")
