"""LaMDA: B's last columns stop first and then stay exactly where they are; S learns on; a resumed run is the same."""

import torch

from graftlm.callbacks.lamda import LamdaCallback, LamdaCallbackConfig
from graftlm.data.batches.pack import collate
from graftlm.model.registry import trainable
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny, perturbed
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples


def test_columns_freeze_from_the_last_and_S_goes_on() -> None:
    state, callback = (
        training(attach_tiny("lamda", tiny_model()), [], total=12),
        LamdaCallback(LamdaCallbackConfig(until=0.5)),
    )
    for t in range(12):
        before = [(delta.PMB.detach().clone(), delta.S.detach().clone()) for _, _, delta in state.sites()]
        run(state, [callback], [[collate(examples(seed=t))]])
        learns = round(4 * (1 - t / 6)) if t < 6 else 0  # r = 4; Python rounds halves to even: 4 3 3 2 1 1 0
        for (B, S), (_, _, delta) in zip(before, state.sites(), strict=True):
            moved = (delta.PMB.detach() != B).any(0).tolist()
            assert moved == [True] * learns + [False] * (4 - learns)
            assert not torch.equal(delta.S.detach(), S)
            assert delta.PMB.requires_grad is (t < 5)


def test_what_a_new_process_finds_frozen_stays_frozen() -> None:
    state = training(attach_tiny("lamda", tiny_model()), [], total=4)
    state.done = 3
    LamdaCallback(LamdaCallbackConfig()).on_start(state)
    assert all(name.endswith(".S") for name in trainable(state.model))


def test_another_method_is_refused() -> None:
    state = training(perturbed("lora", tiny_model()), [])
    with raises("training/callback-unsupported", match="lamda"):
        run(state, [LamdaCallback(LamdaCallbackConfig())], [[collate(examples())]])
