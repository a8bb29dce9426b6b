"""LISA: the layers that it drew learn exactly as they would alone, the others do not move and keep nothing."""

import torch

from graftlm.callbacks.lisa import Lisa, LisaConfig
from graftlm.data.batches.pack import pack
from graftlm.model.registry import trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback
from graftlm.training.state import TrainingState
from tests.callbacks.test_callbacks import run, training
from tests.training.test_loop import examples

BATCHES = [pack(examples(seed=n), 60) for n in range(6)]


class Following(Callback):
    """After each step: the layers that learn, the tensors that moved, and those with moments."""

    def __init__(self) -> None:
        super().__init__(None)
        self.before: dict[str, torch.Tensor] = {}
        self.seen: list[tuple[set[str], set[str]]] = []

    def on_grads(self, training: TrainingState) -> None:
        self.before = {name: p.detach().clone() for name, p in training.parameters().items()}

    def on_step(self, training: TrainingState) -> None:
        now = training.parameters()
        moved = {name for name, p in now.items() if not torch.equal(p, self.before[name])}
        self.seen.append((moved, {name for name, p in now.items() if p in training.optimizer.state}))


def layer(name: str) -> int | None:
    return int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None


def test_only_the_drawn_layers_and_what_lies_in_none_learn() -> None:
    model = perturbed("full", tiny_model(num_hidden_layers=5))
    names, lisa, following = set(trainable(model)), Lisa(LisaConfig(layers=2, every=2)), Following()
    state = training(model, [])
    done = run(state, [following, lisa], BATCHES)  # following first: it looks before another layer is drawn
    drawn = [event["layers"] for step in done for event in step.events]
    assert len(drawn) == 4  # at the start, and after steps 2, 4 and 6
    assert len({tuple(layers) for layers in drawn}) > 1
    for number, (moved, with_state) in enumerate(following.seen):
        learning = {name for name in names if layer(name) in {None, *drawn[number // 2]}}
        assert len(drawn[number // 2]) == 2
        assert moved == with_state == learning
    assert {layer(name) for name in names} == {None, 0, 1, 2, 3, 4}
    lisa.on_end(state)
    assert set(trainable(model)) == names


def test_the_drawn_layers_learn_as_if_the_others_were_no_targets() -> None:
    model = perturbed("lora", tiny_model(num_hidden_layers=4))
    lisa = Lisa(LisaConfig(layers=1, every=100))
    state = training(model, [])
    run(state, [lisa], BATCHES[:3])
    (number,) = lisa.facts["learning"]

    alone = perturbed("lora", tiny_model(num_hidden_layers=4))
    for name, p in trainable(alone).items():
        p.requires_grad_(layer(name) == number)
    run(training(alone, []), [], BATCHES[:3])
    others = dict(alone.named_parameters())
    assert all(torch.equal(p, others[name]) for name, p in state.parameters().items())


def test_every_layer_has_its_turn() -> None:
    model, lisa = perturbed("lora", tiny_model(num_hidden_layers=5)), Lisa(LisaConfig(layers=1, every=1))
    state = training(model, [])
    lisa.on_start(state)
    drawn = []
    for state.done in range(1, 201):
        lisa.on_step(state)
        drawn += lisa.facts["learning"]
    assert all(20 <= drawn.count(number) <= 65 for number in range(5))  # 40 each; 4 standard deviations are 23
