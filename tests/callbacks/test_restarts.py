"""Merge and restart: the function is not changed by it, a chain is what merging into W would give, and it is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.adapters.export.export import plain_lora
from graftlm.adapters.load import load_adapter
from graftlm.adapters.save import save_adapter
from graftlm.callbacks.cola import Cola, ColaConfig
from graftlm.callbacks.lte import Lte, LteConfig
from graftlm.callbacks.periodic_lora import PeriodicLora, PeriodicLoraConfig
from graftlm.data.batches.pack import collate
from graftlm.model.attach import attach, detach
from graftlm.model.modes import deltas_off
from graftlm.model.registry import hosts, trainable
from graftlm.model.state_dict import merged_state
from graftlm.optim.adamw import adamw
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny, logits, perturbed, plain_with, tiny_config
from graftlm.training.callback import Callback
from graftlm.training.state import TrainingState
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples


class Before(Callback):
    """The model's answers between the optimizer's step and the callback that comes after."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seen: list[torch.Tensor] = []

    def on_step(self, training: TrainingState) -> None:
        self.seen.append(logits(training.model))


def step(state: TrainingState, chosen: list[Callback], number: int) -> Any:
    return run(state, chosen, [[collate(examples(seed=number))]])[0]


@pytest.mark.parametrize("method", ["lora", "vera", "moslora", "gated-lora", "multilora", "lamda"])
def test_a_restart_leaves_the_function_as_it_is(method: str, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=False)
    bare = logits(model)
    state = training(attach_tiny(method, model), [], total=6, rate=0.02)
    seen, chosen = Before(), Cola(ColaConfig(every=2))
    for number in range(4):
        result = step(state, [seen, chosen], number)
        assert torch.allclose(logits(model), seen.seen[-1], atol=1e-6 * float(bare.abs().max()) * 10)
        assert bool(result.events) is (number % 2 == 1)
        for _, _, delta in state.sites():
            if number % 2:
                assert not any(p in state.optimizer.state for p in delta.parameters()), "the optimizer forgets"
    assert not torch.allclose(logits(model), bare)
    with deltas_off(model):
        assert torch.equal(logits(model), bare), "the base is never changed"
    save_adapter(model, tmp_path / "chain")
    other = tiny_model(tie_word_embeddings=False)
    load_adapter(other, tmp_path / "chain")
    assert torch.equal(logits(other), logits(model))
    exported = plain_lora(model)
    assert exported.rank == max(len(d.offset_A) + len(d.factors()[0]) for _, _, d in state.sites())
    detach(model)
    assert torch.equal(logits(model), bare)


def test_a_chain_is_merging_into_W_and_training_a_new_lora() -> None:
    """The second link, trained on a model whose very weights have the first in them."""
    state = training(perturbed("lora", tiny_model()), [], total=5)
    for number in range(2):
        step(state, [Cola(ColaConfig(every=2))], number)
    state2 = training(_merged(state), [], total=5)
    for (_, _, ours), (_, _, theirs) in zip(state.sites(), state2.sites(), strict=True):
        theirs.A.data.copy_(ours.A.data)
        assert not ours.B.any()
    for number in (2, 3):
        step(state, [], number)
        state2.done = number
        step(state2, [], number)
    assert torch.allclose(logits(state.model), logits(state2.model), atol=1e-5)


def _merged(state: TrainingState) -> Any:
    return attach(plain_with(merged_state(state.model)), tiny_config("lora"))


def test_momentum_brings_a_stage_in_by_degrees() -> None:
    """W after three stages against the recursion in whole matrices; with m = 0 it is a chain."""
    m, callback = 0.3, PeriodicLora(PeriodicLoraConfig(every=2, momentum=0.3))
    state, chain = (training(perturbed("lora", tiny_model()), [], total=8) for _ in range(2))
    zero, cola = PeriodicLora(PeriodicLoraConfig(every=2, momentum=0.0)), Cola(ColaConfig(every=2))
    other = training(perturbed("lora", tiny_model()), [], total=8)
    V: dict[str, Any] = {}
    W: dict[str, Any] = {}
    for number in range(6):
        keeper = Keep()
        step(state, [keeper, callback], number)
        step(chain, [cola], number)
        step(other, [zero], number)
        if number % 2:
            for site, product in keeper.products.items():
                V[site] = m * V.get(site, 0) + (1 - m) * product
                W[site] = W.get(site, 0) + V[site]
    for _, site, delta in state.sites():
        torch.testing.assert_close(-delta.offset_B @ delta.offset_A, W[site])
    assert torch.allclose(logits(chain.model), logits(other.model), atol=1e-6)


class Keep(Callback):
    def __init__(self) -> None:
        super().__init__(None)

    def on_step(self, training: TrainingState) -> None:
        self.products = {site: delta.matrix().detach() for _, site, delta in training.sites()}


def test_heads_are_models_of_their_own_that_are_averaged() -> None:
    """N models with whole weights, an AdamW each, trained apart on their own batches and averaged by hand."""
    N, T, rounds = 2, 3, 2
    callback = Lte(LteConfig(heads=N, every=T))
    state = training(attach_tiny("lora", tiny_model()), [], total=N * T * rounds)
    starts: list[dict[str, torch.Tensor]] = [_copy(state.model)]
    for number in range(N * T * rounds):
        step(state, [callback], number)
        if number == T - 1:
            starts.append(_copy(state.model))
    callback.on_end(state)

    bases = {name: host.view.weight.clone() for name, host in hosts(tiny_like()).items()}
    W = {name: w.clone() for name, w in bases.items()}
    loras = [tiny_like() for _ in range(N)]
    optimizers = [adamw([(trainable(lora).values(), 0.01)], weight_decay=0.0) for lora in loras]
    for lora, start in zip(loras, starts, strict=True):
        for name, p in trainable(lora).items():
            p.data.copy_(start[name])
    last = [{name: torch.zeros_like(w) for name, w in W.items()} for _ in range(N)]
    for number in range(rounds):
        for n in range(N):
            for name, host in hosts(loras[n]).items():
                host.base.weight.data = W[name] - last[n][name]
            own = TrainingState(loras[n], state.deltas, optimizers[n], total=99, seed=3)
            own.done = number * N * T + n * T
            for t in range(T):
                step(own, [], own.done if t else number * N * T + n * T)
        here = [{name: host.on()[0].matrix().detach() for name, host in hosts(lora).items()} for lora in loras]
        for name in W:
            W[name] = W[name] + sum(here[n][name] - last[n][name] for n in range(N)) / N
        last = here
    merged = merged_state(state.model)
    for name, w in W.items():
        torch.testing.assert_close(merged[f"{name}.weight"], w, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(w, bases[name])


def test_looking_at_the_mean_in_the_middle_changes_nothing() -> None:
    ends = []
    for looks in (False, True):
        state, callback = training(attach_tiny("lora", tiny_model()), [], total=12), Lte(LteConfig(heads=3, every=2))
        for number in range(12):
            step(state, [callback], number)
            if looks:
                own = logits(state.model)
                with callback.evaluating(state):
                    seen = logits(state.model)
                assert torch.equal(logits(state.model), own)
                assert torch.equal(seen, own) is ((number + 1) % 6 == 0), "after a round all go on from the mean"
        callback.on_end(state)
        ends.append(logits(state.model))
    assert torch.equal(*ends)
    assert torch.allclose(seen, ends[1], atol=1e-6)


def tiny_like() -> Any:
    return attach_tiny("lora", tiny_model())


def _copy(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable(model).items()}


@pytest.mark.parametrize("method", ["dora", "mora", "ia3"])
@pytest.mark.parametrize(
    "callback", [Cola(ColaConfig(every=2)), PeriodicLora(PeriodicLoraConfig(every=2)), Lte(LteConfig())]
)
def test_a_delta_without_factors_is_refused(callback: Callback, method: str) -> None:
    state = training(perturbed(method, tiny_model()), [])
    with raises("training/callback-unsupported", match="no product B A"):
        step(state, [callback], 0)


def test_other_refusals() -> None:
    for every, says in ((1, "two steps"), (4, "ends before")):
        with raises("training/callback-unsupported", match=says):
            step(training(perturbed("lora", tiny_model()), []), [Cola(ColaConfig(every=every))], 0)
    with raises("training/callback-unsupported", match="init: zero"):
        step(training(attach_tiny("lora", tiny_model(), init="pissa"), []), [Lte(LteConfig(every=2))], 0)
    state = training(perturbed("lora", tiny_model()), [])
    state.optimizer = torch.optim.SGD(trainable(state.model).values(), lr=0.1)
    with raises("training/callback-unsupported", match="another optimizer"):
        step(state, [Lte(LteConfig(every=2))], 0)
