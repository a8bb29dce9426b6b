"""SpIEL's indices move to where the dense gradient is; diff pruning ends with the greatest changes and no others."""

import math
from typing import Any

import pytest
import torch

from graftlm.callbacks.diff_pruning import DiffPruningCallback, DiffPruningCallbackConfig
from graftlm.callbacks.spiel import SpielCallback, SpielCallbackConfig
from graftlm.data.batches.pack import collate
from graftlm.model.state_dict import merged_state
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny, perturbed, plain_with
from graftlm.training.callback import Callback
from graftlm.training.state import TrainingState
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples


def dense_gradients(model: Any, packs: list[Any], sites: list[str]) -> dict[str, torch.Tensor]:
    """The gradient in W' of the mean loss, on a model that has W' for its weights."""
    plain = plain_with(merged_state(model))
    for site in sites:
        plain.get_submodule(site).weight.requires_grad_(True)
    count = sum(float(pack.weights.sum()) for pack in packs)
    with packed_attention(plain):
        for pack in packs:
            (-(log_probs(plain, pack) * pack.weights).sum() / count).backward()
    return {site: plain.get_submodule(site).weight.grad for site in sites}


def test_indices_move_from_small_changes_to_great_gradients() -> None:
    state, callback = (
        training(attach_tiny("spiel", tiny_model()), [], total=8),
        SpielCallback(SpielCallbackConfig(every=3, share=0.4, until=0.8)),
    )
    sites = [site for _, site, _ in state.sites()]
    start = {site: delta.eta.clone() for _, site, delta in state.sites()}
    for number in range(2):
        run(state, [callback], [[collate(examples(seed=number))]])
    assert all(torch.equal(delta.eta, start[site]) for _, site, delta in state.sites())
    packs = [collate(examples(4, seed=5)), collate(examples(4, seed=6))]
    G = dense_gradients(state.model, packs, sites)
    seen = Seen()
    (step,) = run(state, [seen, callback], [packs])
    total = 0
    for _, site, delta in state.sites():
        phi = seen.phi[site]  # the last time was the start, where all were zero
        n = int(0.4 * len(phi) * (1 + math.cos(math.pi * 3 / 6.4)) / 2)
        dropped = set(phi.abs().argsort()[:n].tolist())
        there = set(start[site].tolist())
        wanted = [i for i in G[site].abs().flatten().argsort(descending=True).tolist() if i not in there][:n]
        assert {int(delta.eta[i]) for i in dropped} == set(wanted)
        assert len(delta.eta.unique()) == len(phi)
        moments = state.optimizer.state[delta.phi]
        for i in range(len(phi)):
            if i in dropped:
                assert delta.phi[i] == moments["exp_avg"][i] == moments["exp_avg_sq"][i] == 0
            else:
                assert delta.phi[i] == phi[i]
                assert delta.eta[i] == start[site][i]
        total += n
    assert step.events == ({"event": "moved", "callback": "spiel", "indices": total},)
    moved = {site: delta.eta.clone() for _, site, delta in state.sites()}
    for number in range(3, 8):
        run(state, [callback], [[collate(examples(seed=number))]])
    assert not all(torch.equal(delta.eta, moved[site]) for _, site, delta in state.sites()), "the second time"


class Seen(Callback):
    def __init__(self) -> None:
        super().__init__(None)

    def on_step(self, training: TrainingState) -> None:
        self.phi = {site: delta.phi.detach().clone() for _, site, delta in training.sites()}


def test_what_is_left_of_a_diff_are_its_greatest_entries() -> None:
    state = training(attach_tiny("diff-pruning", tiny_model()), [], total=6)
    callback = DiffPruningCallback(DiffPruningCallbackConfig(density=0.05, after=0.5))
    for module in state.model.modules():
        if hasattr(module, "deltas"):
            module.deltas.train()  # noise on the gates
    before, events_by_step = ValuesBefore(), []
    for number in range(6):
        state.zero_gradients = None  # gates that are shut leave a tensor without a gradient for two steps
        events_by_step.append(run(state, [before, callback], [[collate(examples(seed=number))]])[0].events)
        if number == 2:
            whole = torch.cat([m.flatten() for m in before.matrices])
            now = torch.cat([delta.matrix().detach().flatten() for _, _, delta in state.sites()])
            order = whole.abs().argsort(descending=True)
            count = int(0.05 * len(whole))
            assert torch.equal(now[order[:count]], whole[order[:count]])
            assert not now[order[count:]].any()
    assert [bool(events) for events in events_by_step] == [False, False, True, False, False, False]
    after = torch.cat([delta.matrix().detach().flatten() for _, _, delta in state.sites()])
    assert torch.equal(after != 0, now != 0), "no other entries"
    assert not torch.equal(after, now), "they learn on"


class ValuesBefore(Callback):
    def __init__(self) -> None:
        super().__init__(None)

    def on_step(self, training: TrainingState) -> None:
        with torch.no_grad():
            self.matrices = [delta.matrix().clone() for _, _, delta in training.sites()]


@pytest.mark.parametrize(
    ("method", "callback", "says"),
    [("lora", SpielCallback(SpielCallbackConfig()), "method: spiel"),
     ("spiel", SpielCallback(SpielCallbackConfig()), "nothing"),
     ("lora", DiffPruningCallback(DiffPruningCallbackConfig()), "method: diff-pruning"),
     ("diff-pruning", DiffPruningCallback(DiffPruningCallbackConfig(after=0.1)), "no step before")],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(method: str, callback: Callback, says: str) -> None:
    with raises("training/callback-unsupported", match=says):
        run(training(perturbed(method, tiny_model()), []), [callback], [[collate(examples())]])
