"""SoRA: the gates after a step are the optimizer's, pulled towards zero by the rate times lambda, and no further."""

import pytest
import torch

from graftlm.callbacks.sora import Sora, SoraConfig
from graftlm.data.batches.pack import collate
from graftlm.model.attach import attach
from graftlm.model.registry import hosts
from graftlm.testing import tiny_model
from graftlm.testing.deltas import logits, perturbed, tiny_config
from graftlm.training.callback import Callback
from tests.callbacks.test_callbacks import run, training
from tests.errors import raises
from tests.golden.check import against_reference
from tests.training.test_loop import examples


def by_ranks(tensors, W, b, x, delta):  # type: ignore[no-untyped-def]
    y = x @ W.T
    for i in range(4):
        y = y + 6 / 4 * tensors["g"][i] * torch.outer(x @ tensors["A"][i], tensors["B"][:, i])
    return y


def test_the_method_is_a_sum_over_gated_ranks() -> None:
    against_reference("gated-lora", by_ranks)


def gates(chosen: list[Callback], steps: int = 1, total: int = 4) -> torch.Tensor:
    state = training(perturbed("gated-lora", tiny_model()), [], rate=0.02, total=total)
    run(state, chosen, [[collate(examples(seed=number))] for number in range(steps)])
    return torch.cat([delta.g.detach() for _, _, delta in state.sites()])


def test_a_step_is_the_optimizers_and_then_the_proximal_map() -> None:
    plain = gates([])
    wanted = torch.tensor([max(abs(g) - 0.02 * 30.0, 0.0) * (1 if g > 0 else -1) for g in plain.tolist()])
    torch.testing.assert_close(gates([Sora(SoraConfig(sparsity=30.0))]), wanted)
    assert not torch.equal(plain, wanted)


def test_lambda_rises_evenly_and_gates_shut_for_good() -> None:
    callback = Sora(SoraConfig(sparsity=5.0, sparsity_last=20.0))
    state = training(perturbed("gated-lora", tiny_model()), [], rate=0.02, total=4)
    found, events = [], []
    for number in range(4):
        events += [step.events for step in run(state, [callback], [[collate(examples(seed=number))]])]
        found.append(callback.sparsity(state))
    assert found == pytest.approx([5, 10, 15, 20])
    assert events[:3] == [()] * 3
    ranks = {site: int((delta.g != 0).sum()) for _, site, delta in state.sites()}
    assert events[3][0]["ranks"] == ranks
    assert 0 < sum(ranks.values()) < 4 * len(ranks)
    plain = tiny_model()  # what is left is a LoRA of the gates that are open
    attach(plain, tiny_config("lora"))
    for _, site, delta in state.sites():
        lora, is_open = hosts(plain)[site].deltas["default"], (delta.g != 0).float()
        lora.A.data, lora.B.data = delta.A.data, delta.B.data * (is_open * delta.g.data)
    assert torch.allclose(logits(plain), logits(state.model), atol=1e-5)


def test_without_gates_it_is_refused() -> None:
    state = training(perturbed("lora", tiny_model()), [])
    with raises("training/callback-unsupported", match="gated-lora"):
        run(state, [Sora(SoraConfig())], [[collate(examples())]])
