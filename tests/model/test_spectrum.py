"""Ranks follow the spectrum of W: the budget is met, and no single move would make the shares more even."""

import pytest
import torch

from graftlm.deltas.lora import LoraConfig
from graftlm.model.attach import attach
from graftlm.model.registry import hosts
from graftlm.model.spectrum import ranks_by_spectrum
from graftlm.testing import tiny_model
from graftlm.testing.deltas import logits, tiny_config
from tests.errors import raises


def shares(W: torch.Tensor) -> list[float]:
    S = torch.linalg.svd(W.double())[1] ** 2
    return [float(S[: r + 1].sum() / S.sum()) for r in range(len(S))]


def test_the_budget_is_met_and_the_least_share_is_as_great_as_can_be() -> None:
    model = tiny_model()
    with torch.no_grad():  # one layer of nearly rank 1, which needs little
        W = model.model.layers[0].mlp.up_proj.weight
        W.copy_(torch.outer(torch.randn(len(W)), torch.randn(W.shape[1])) + 0.01 * W)
    config = ranks_by_spectrum(model, LoraConfig(r=4, alpha=6.0))
    attach(model, config)
    found = {site: host.on()[0] for site, host in hosts(model).items()}
    ranks = {site: len(delta.A) for site, delta in found.items()}
    assert sum(ranks.values()) == 4 * len(ranks)
    assert ranks["model.layers.0.mlp.up_proj"] == 1
    assert len(set(ranks.values())) > 2
    assert all(delta.scale == pytest.approx(6 / 4) for delta in found.values())
    held = {site: shares(delta.site.W()) for site, delta in found.items()}
    least = min(held[site][r - 1] for site, r in ranks.items())
    for site, r in ranks.items():  # a rank taken from any site would leave it below the least of all
        assert r == 1 or held[site][r - 2] <= least + 1e-6


def test_it_serves_lamda_too_and_says_what_it_cannot() -> None:
    model = tiny_model()
    before = logits(model)
    attach(model, ranks_by_spectrum(model, tiny_config("lamda"), mean=3))
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert sum(len(host.on()[0].S) for host in hosts(model).values()) == 3 * len(hosts(model))
    with raises("target/method-without-rank"):
        ranks_by_spectrum(tiny_model(), tiny_config("ia3"))
    with raises("target/rank-too-large"):
        ranks_by_spectrum(tiny_model(), LoraConfig(r=100))
    with raises("target/patterns-already-set"):
        ranks_by_spectrum(tiny_model(), LoraConfig(patterns={"q_proj": {"r": 2}}))
