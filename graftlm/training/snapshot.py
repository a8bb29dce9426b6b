"""What the state of a run is: all that a step changes, as tensors on the CPU and facts that JSON can say.

delta/NAME/KEY          the tensors of a delta
beside/NAME             parameters that the loss trains, such as a value head
optimizer/NAME/KEY      what the optimizer remembers of a parameter
callback/NAME/KEY       the tensors of a callback
done, seen, phase       optimizer steps of the phase, batches of the run, the batch with which the phase begins
failures, zero_gradients, optimizer, callbacks

Randomness needs no place here: it depends on the seed, the step and the rank alone (`TrainingState.seed_for`).
"""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from graftlm.adapters.tensors import fill_delta, tensors_of_delta
from graftlm.errors import TrainingError, numbered
from graftlm.training.callback import Callback
from graftlm.training.objective import extra_parameters
from graftlm.training.state import TrainingState

FROM_RECIPE = {"lr", "largest_lr", "weight_decay"}
"""What of an optimizer's groups follows from the recipe, so that a recipe that was changed on purpose counts."""


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps: tensors on the CPU that nobody changes any more, and facts that JSON can say."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def take(training: TrainingState, callbacks: Sequence[Callback], deltas: Sequence[str]) -> Snapshot:
    """Copy all that a step changes: these deltas of the model, and the optimizer and callbacks of those that learn."""
    tensors: dict[str, Tensor] = {}
    for name in deltas:
        tensors |= {f"delta/{name}/{key}": t for key, t in tensors_of_delta(training.model, name).items()}
    learns_too = extra_parameters(training.model)
    tensors |= {f"beside/{name}": parameter for name, parameter in learns_too.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in (training.parameters() | learns_too).items():
        for key, value in training.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    for callback in callbacks:
        tensors |= {f"callback/{callback.config.name}/{key}": tensor for key, tensor in callback.tensors.items()}
    groups = [
        {k: v for k, v in group.items() if isinstance(v, int | float) and k not in FROM_RECIPE}
        for group in training.optimizer.param_groups
    ]
    still = training.zero_gradients
    facts = {
        "done": training.done,
        "seen": training.seen,
        "phase": training.first,
        "failures": training.failures,
        "zero_gradients": None if still is None else sorted(still),
        "optimizer": {"class": type(training.optimizer).__name__, "groups": groups, "kept": numbers},
        "callbacks": {callback.config.name: json.loads(json.dumps(callback.facts)) for callback in callbacks},
    }
    copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    return Snapshot(copies, facts)


def put_back(snapshot: Snapshot, training: TrainingState, callbacks: Sequence[Callback]) -> None:
    """Restore a copy of `take` into an optimizer and callbacks that are made for the same parameters."""
    saved_optimizer = snapshot.facts["optimizer"]
    if saved_optimizer["class"] != type(training.optimizer).__name__:
        raise TrainingError(
            f"the checkpoint is of optimizer {saved_optimizer['class']}, the recipe makes "
            f"{type(training.optimizer).__name__}",
            code="checkpoint-mismatch",
        )
    facts = snapshot.facts
    training.done, training.seen = facts["done"], facts["seen"]
    training.failures = facts.get("failures", 0)  # earlier versions did not save these two
    still = facts.get("zero_gradients", [] if training.done else None)
    training.zero_gradients = None if still is None else set(still)
    learns_too = extra_parameters(training.model)
    for name, tensor in _under("beside", snapshot).items():
        learns_too[name].data.copy_(tensor)
    parameters = training.parameters() | learns_too
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in saved_optimizer["kept"].items()}
    for name, tensor in _under("optimizer", snapshot).items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(parameter, {})[key] = tensor.clone()  # nobody changes a snapshot
    if strange := sorted(state.keys() - parameters.keys()):
        raise TrainingError(
            f"the checkpoint's optimizer knows tensors that are not here:\n{numbered(strange)}",
            code="checkpoint-mismatch",
        )
    tree = training.optimizer.state_dict()
    number = {id(p): i for i, p in enumerate(p for group in training.optimizer.param_groups for p in group["params"])}
    tree["state"] = {number[id(parameters[name])]: values for name, values in state.items()}
    for group, saved in zip(tree["param_groups"], saved_optimizer["groups"], strict=True):
        group |= saved
    training.optimizer.load_state_dict(tree)  # it knows which of these belong on which device
    for callback in callbacks:
        name = callback.config.name
        callback.facts = deepcopy(facts["callbacks"].get(name, {}))
        device: Any = training.model.device
        callback.tensors = {key: t.to(device, copy=True) for key, t in _under(f"callback/{name}", snapshot).items()}


def put_deltas_back(snapshot: Snapshot, model: Any, deltas: Sequence[str]) -> None:
    """The deltas of the snapshot into deltas that are attached; AdapterError where they are others."""
    for name in deltas:
        fill_delta(model, name, _under(f"delta/{name}", snapshot), Path(f"the state of delta {name}"))


def _under(beginning: str, snapshot: Snapshot) -> dict[str, Tensor]:
    beginning += "/"
    return {key[len(beginning) :]: tensor for key, tensor in snapshot.tensors.items() if key.startswith(beginning)}
