"""Losses are pure functions of log-probabilities: sums and counts, checked by hand."""

import pytest
import torch

from graftlm.losses import LOSSES, supervised


def test_supervised_is_the_weighted_sum_of_negative_log_likelihoods() -> None:
    policy = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 0.0])
    found = supervised(policy, None, weights)
    assert found.sum.item() == pytest.approx(1 * 1 + 0.5 * 2)
    assert found.count.item() == pytest.approx(1.5)
    found.sum.backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [-1.0, -0.5, 0.0]


@pytest.mark.parametrize("name", LOSSES)
def test_sums_and_counts_add_up_over_any_split(name: str) -> None:
    policy, weights = -torch.rand(10), torch.rand(10)
    whole = LOSSES[name](policy, None, weights)
    parts = [LOSSES[name](p, None, w) for p, w in zip(policy.split(3), weights.split(3), strict=True)]
    assert sum(p.sum for p in parts).item() == pytest.approx(whole.sum.item())  # type: ignore[union-attr]
    assert sum(p.count for p in parts).item() == pytest.approx(whole.count.item())  # type: ignore[union-attr]
