"""Every objective on several processes: loss, metrics and gradients are those of one."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import graftlm.training.loop as loop
from graftlm import distributed
from graftlm.data.batches.pack import pack
from graftlm.losses import LOSSES
from graftlm.model.registry import trainable
from graftlm.training.objective import Objective
from graftlm.training.sharding import shard
from graftlm.training.state import TrainingState
from tests.training.test_objective import OPTIONS, answered, items, moved
from tests.training.together import together

ROWS = 3
"""Groups of a step: on four ranks one has nothing to do."""


def one(name: str, options: dict[str, Any], sharded: bool) -> dict[str, Any]:
    distributed.start()
    model = moved()
    objective = Objective(LOSSES[name].config(**options))
    objective.add_head(model, {})
    if sharded:
        shard(model)
    rows = items(name, answered(ROWS))
    make = partial(pack, tokens=40, share=True)
    packs = [
        part
        for some in (rows, objective.mismatched(rows))
        for part in distributed.packs_of(some, make, sharded=distributed.is_sharded(model))
    ]
    gradients: dict[str, Tensor] = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            gradients.update({key: p.grad.clone() for key, p in trainable(model).items() if p.grad is not None})

    training = TrainingState(model, {}, Recorder(trainable(model).values(), lr=0.0))
    step = loop.TrainStep(training, objective.config, lambda n: 1.0, clip=1e9).step(packs)
    return {"loss": step.loss, "metrics": dict(step.metrics), "tokens": step.tokens, "gradients": gradients}


def every(sharded: bool) -> list[dict[str, Any]]:
    return [one(name, options, sharded) for name, options in OPTIONS]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return every(False)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "sharded"), [(2, False), (4, False), (2, True), (4, True)])
def test_every_objective_is_that_of_one_process(count: int, sharded: bool, alone: list[dict[str, Any]]) -> None:
    for number, results in enumerate(together(count, every, sharded)):
        for case, ours, wanted in zip(OPTIONS, results, alone, strict=True):
            assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-5), (number, case)
            assert ours["metrics"] == pytest.approx(wanted["metrics"], rel=1e-5, abs=1e-5), (number, case)
            assert ours["tokens"] == wanted["tokens"], (number, case)
            assert ours["gradients"].keys() == wanted["gradients"].keys()
            largest = max(float(tensor.abs().max()) for tensor in wanted["gradients"].values())
            for key, tensor in wanted["gradients"].items():
                error = float((ours["gradients"][key] - tensor).abs().max()) / largest
                assert error <= 1e-5, (number, case, key, error)
