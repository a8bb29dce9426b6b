"""Policies of ranks with several processes: the same ranks and masks as with one, and the same tensors."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from graftlm import distributed
from graftlm.config.schema import build
from graftlm.data.batches.pack import Pack, pack
from graftlm.model.registry import trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from tests.callbacks.tables import TABLE
from tests.callbacks.test_callbacks import run, training
from tests.callbacks.test_inner_split import with_inner_loss
from tests.callbacks.test_resume import CASES
from tests.training.test_loop import examples
from tests.training.together import together

pytestmark = pytest.mark.slow

OF_RANKS = ("adalora", "alora", "autolora", "bilora", "diffora", "dylora", "increlora", "lamda", "sora")
OTHERS = ("i-lora", "spiel")
"""They too gather something of a step beside its gradient."""
STEPS = 8


def make(rows: Sequence[Any]) -> list[Pack]:
    return pack(rows, 60)


def whole_run(name: str) -> dict[str, Any]:
    method, options = CASES[name]
    callback = TABLE[name].callback(build(TABLE[name].config, {"name": name, **options}, source="test"))
    # In float64 the order of a sum, which the number of ranks changes, is far below the tolerance. What is left is the
    # head's log-softmax in float32.
    state = with_inner_loss(training(perturbed(method, tiny_model()).double(), [], total=STEPS))
    # Adam would divide by the size of each gradient, and so make steps of rounding noise where there is no more.
    state.optimizer = torch.optim.SGD(trainable(state.model).values(), lr=0.1)
    batches = [distributed.packs_of(examples(seed=number), make) for number in range(STEPS)]
    done = run(state, [callback], batches)
    callback.on_end(state)
    return {
        "events": [event for step in done for event in step.events],
        "facts": callback.facts,
        "tensors": {key: t.detach().clone() for key, t in {**trainable(state.model), **callback.tensors}.items()},
        "losses": [step.loss for step in done],
    }


def all_runs() -> dict[str, dict[str, Any]]:
    distributed.start()
    return {name: whole_run(name) for name in (*OF_RANKS, *OTHERS)}


@pytest.fixture(scope="module")
def both() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return all_runs(), together(2, all_runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OF_RANKS, *OTHERS])
def test_what_is_chosen_and_learnt_is_that_of_one_process(name: str, both: Any) -> None:
    wanted = both[0][name]
    for found in (each[name] for each in both[1]):
        assert found["events"] == wanted["events"]
        assert found["facts"] == wanted["facts"]
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert found["tensors"].keys() == wanted["tensors"].keys()
        for key, tensor in wanted["tensors"].items():
            assert torch.equal(found["tensors"][key] == 0, tensor == 0), (key, "the same are switched off")
            error = float((found["tensors"][key] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-12))
            assert error <= 1e-5, (key, error)
    one, other = both[1]
    for key, tensor in one[name]["tensors"].items():
        assert torch.equal(tensor, other[name]["tensors"][key]), (key, "both ranks have the very same")


def test_something_was_chosen(both: Any) -> None:
    chose = {name for name in OF_RANKS if both[0][name]["events"]}
    assert chose >= {"adalora", "alora", "autolora", "diffora", "increlora"}
