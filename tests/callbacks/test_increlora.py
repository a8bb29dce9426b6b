"""IncreLoRA: scores by the dense gradient of each W, ranks to the best sites, E held where it does not learn yet."""

import math
from typing import Any

import pytest
import torch

from graftlm.callbacks.increlora import IncreLora, IncreLoraConfig
from graftlm.data.batches.pack import collate, pack
from graftlm.model.state_dict import merged_state
from graftlm.passes.forward import log_probs
from graftlm.passes.packed_attention import packed_attention
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny, perturbed, plain_with
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.training.test_loop import examples

SETTINGS: dict[str, Any] = {
    "first": 1,
    "target_r": 3,
    "every": 2,
    "warmup": 0.2,
    "until": 0.8,
    "beta1": 0.6,
    "beta2": 0.7,
}


def dense_score(model: Any, site: str, pack: Any, change: torch.Tensor) -> float:
    """The same loss on a model whose weights are W': its gradient in W' is the paper's."""
    plain = plain_with(merged_state(model))
    W = plain.get_submodule(site).weight.requires_grad_(True)
    with packed_attention(plain):
        found = log_probs(plain, pack)
        (-(found * pack.weights).sum() / pack.weights.sum()).backward()
    return float((change * W.grad).abs().sum()) / math.sqrt(W.numel())


@pytest.mark.parametrize("tokens", [1000, 60])
def test_scores_are_those_of_dense_gradients(tokens: int) -> None:
    """However many packs a step is."""
    state, callback = training(perturbed("adalora", tiny_model()), [], total=10), IncreLora(IncreLoraConfig(**SETTINGS))
    callback.on_start(state)
    smooth, unsure = 0.0, 0.0
    for number in range(2):
        batch = collate(examples(seed=number))
        here = [dense_score(state.model, site, batch, delta.matrix().detach()) for _, site, delta in state.sites()]
        run(state, [callback], [pack(examples(seed=number), tokens)])
        smooth = 0.6 * smooth + 0.4 * torch.tensor(here)
        unsure = 0.7 * unsure + 0.3 * (torch.tensor(here) - smooth).abs()
    torch.testing.assert_close(callback.tensors["smooth"], smooth, rtol=1e-4, atol=0)
    torch.testing.assert_close(callback.tensors["unsure"], unsure, rtol=1e-3, atol=1e-9)


def test_ranks_come_to_the_best_sites_until_the_target() -> None:
    state, callback = (
        training(attach_tiny("adalora", tiny_model()), [], total=10),
        IncreLora(IncreLoraConfig(**SETTINGS)),
    )
    sites = [f"{name}/{site}" for name, site, _ in state.sites()]
    count, events_by_step, before = len(sites), [], {}
    for number in range(10):
        (step,) = run(state, [callback], [[collate(examples(seed=number))]])
        events_by_step.append(step.events)
        have = callback.facts["ranks"]
        for name, site, delta in state.sites():
            E, r = delta.E.detach()[:, 0], have[f"{name}/{site}"]
            assert E[:r].all()
            assert E[r:].tolist() == [pytest.approx(1e-5 if number < 7 else 0.0)] * (r < 4) + [0.0] * max(0, 3 - r)
        if step.events:
            moment = [2, 4, 6, 8].index(number + 1) + 1
            assert sum(have.values()) == step.events[0]["total"] == count + 2 * count * moment // 4
            scores = dict(zip(sites, (callback.tensors["smooth"] * callback.tensors["unsure"]).tolist(), strict=True))
            gained = {s for s in sites if have[s] > before.get(s, 1)}
            open_ = [s for s in sites if before.get(s, 1) < 4]
            assert gained == set(sorted(open_, key=lambda s: -scores[s])[: len(gained)])
            before = dict(have)
    assert [bool(events) for events in events_by_step] == [n + 1 in (2, 4, 6, 8) for n in range(10)]
    assert sum(before.values()) == 3 * count
    assert len(set(before.values())) > 1


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [("lora", {}, "method: adalora"), ("adalora", {"target_r": 5}, "<= r 4"),
     ("adalora", {"target_r": 3, "every": 9}, "no step")],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(method: str, changes: dict[str, Any], says: str) -> None:
    state = training(perturbed(method, tiny_model()), [])
    with raises("training/callback-unsupported", match=says):
        run(state, [IncreLora(IncreLoraConfig(**changes))], [[collate(examples())]])
