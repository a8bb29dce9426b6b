"""LoRA-SP: what is frozen never moves, the rest moves as without it, and the half is a half."""

import pytest
import torch

from graftlm.callbacks.lora_sp import LoraSp, LoraSpConfig
from graftlm.data.batches.pack import pack
from graftlm.model.registry import trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import perturbed
from graftlm.training.callback import Callback, check_callbacks, make_optimizer
from graftlm.training.state import ParameterGroup, TrainingState
from tests.callbacks.tables import with_optimizer
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples

BATCHES = [pack(examples(seed=n), 60) for n in range(3)]


def moves(chosen: list[Callback], batches: list[list[object]]) -> dict[str, torch.Tensor]:
    model = perturbed("lora", tiny_model())
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    run(training(model, chosen), chosen, batches)
    return {name: p.detach() - start[name] for name, p in dict(model.named_parameters()).items() if name in start}


def test_half_of_the_elements_stay_and_the_others_take_their_step() -> None:
    plain, masked = moves([], BATCHES[:1]), moves([LoraSp(LoraSpConfig())], BATCHES[:1])
    for name, step in masked.items():
        learns = step != 0
        assert torch.equal(step[learns], plain[name][learns])
    share = sum(int((step != 0).sum()) for step in masked.values()) / sum(step.numel() for step in masked.values())
    assert share == pytest.approx(0.5, abs=0.03)


def test_the_same_elements_at_every_step() -> None:
    one, three = moves([LoraSp(LoraSpConfig())], BATCHES[:1]), moves([LoraSp(LoraSpConfig())], BATCHES)
    assert all(torch.equal(step != 0, three[name] != 0) for name, step in one.items())


def test_whole_tensors() -> None:
    masked = moves([LoraSp(LoraSpConfig(whole=True))], BATCHES)
    moved = [bool(step.any()) for step in masked.values()]
    assert sum(moved) == len(moved) - round(0.5 * len(moved))


def test_weight_decay_is_refused() -> None:
    model, chosen = perturbed("lora", tiny_model()), [LoraSp(LoraSpConfig())]
    optimizer = make_optimizer(with_optimizer(chosen), [ParameterGroup(trainable(model), 0.1)], weight_decay=0.1)
    state = TrainingState(model, training(model, []).deltas, optimizer, total=1, seed=0)
    with raises("training/callback-unsupported", match="weight_decay: 0"):
        check_callbacks(chosen, state)
