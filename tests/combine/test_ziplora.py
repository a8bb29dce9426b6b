"""ZipLoRA: its objective, the gradient of it, the closed form that it has without `balance`, and what Adam finds."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from graftlm.combine.core import left_basis
from graftlm.combine.rules.ziplora import Inputs, loss_and_gradient, zipped
from graftlm.testing.deltas import close
from tests.combine.sites import D_IN, change, changes, composed, moment, rule_of

WEIGHTS = [1.0, 0.5, -0.7]


def stacked(*ranks: int) -> Tensor:
    return torch.stack([one.matrix() for one in changes(*ranks)])


def inputs_of(given: Tensor, *, with_moments: bool) -> list[Inputs]:
    if with_moments:
        return [Inputs(moment=moment(one)) for one in changes(3, 2, 4)[: len(given)]]
    return [Inputs(rows=M) for M in given]


def dense(m: Tensor, given: Tensor, weights: Sequence[float], moments: Sequence[Tensor], balance: float) -> Tensor:
    """The objective from its definition, with whole matrices."""
    M = torch.stack([given[i] @ m[i].diag() for i in range(len(given))]).sum(0)
    total = torch.zeros((), dtype=torch.float64)
    for i, G in enumerate(moments):
        apart = M - weights[i] * given[i]
        total = total + torch.trace(apart @ G @ apart.T) / torch.trace(given[i] @ G @ given[i].T)
    for i in range(len(given)):
        for k in range(i):
            total = total + balance * (m[i] * m[k]).abs().mean()
    return total


def moments_of(given: Tensor, inputs: Sequence[Inputs]) -> list[Tensor]:
    return [one.of(torch.eye(given.shape[2], dtype=torch.float64)) for one in inputs]


@pytest.mark.parametrize("with_moments", [False, True])
def test_loss_and_gradient_are_those_of_the_definition(*, with_moments: bool) -> None:
    given = stacked(3, 2, 4)
    inputs = inputs_of(given, with_moments=with_moments)
    m = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    wanted = dense(m, given, WEIGHTS, moments_of(given, inputs), 0.3)
    wanted.backward()
    loss, gradient = loss_and_gradient(m.detach(), given, WEIGHTS, inputs, 0.3)
    assert m.grad is not None
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-10)
    close(gradient, m.grad, "gradient", 1e-10)


@pytest.mark.parametrize("with_moments", [False, True])
def test_without_balance_the_minimum_is_that_of_linear_equations_and_is_found(*, with_moments: bool) -> None:
    given = stacked(3, 2)
    inputs = inputs_of(given, with_moments=with_moments)
    moments = moments_of(given, inputs)
    H = torch.autograd.functional.hessian(
        lambda m: dense(m.view(2, D_IN), given, WEIGHTS[:2], moments, 0.0), torch.zeros(2 * D_IN, dtype=torch.float64)
    )
    g = loss_and_gradient(torch.zeros(2, D_IN, dtype=torch.float64), given, WEIGHTS[:2], inputs, 0.0)[1].flatten()
    solved = -torch.linalg.pinv(H, hermitian=True) @ g
    lowest, gradient = loss_and_gradient(solved.view(2, D_IN), given, WEIGHTS[:2], inputs, 0.0)
    assert float(gradient.abs().max()) < 1e-9
    rule = rule_of("ziplora", balance=0.0, steps=2000)
    given_changes, weights = changes(3, 2), WEIGHTS[:2]
    found = composed(given_changes, weights, rule, "product", rank=13, moments=moments if with_moments else None)
    start = loss_and_gradient(
        torch.tensor(weights, dtype=torch.float64)[:, None].expand(2, D_IN), given, weights, inputs, 0.0
    )[0]
    loss = sum(
        float(((found - w * M) @ G @ (found - w * M).T).trace() / (M @ G @ M.T).trace())
        for w, M, G in zip(weights, given, moments, strict=True)
    )
    assert loss < lowest + 0.02 * (start - lowest)
    if not with_moments:
        assert lowest < 1e-9, "both adapters keep their outputs: there are more columns than equations"


def test_with_all_inputs_alike_and_no_balance_the_result_is_the_mean_of_two_of_one_size() -> None:
    given = [change(3, 1), change(3, 2)]
    sizes = [float(one.matrix().norm()) for one in given]
    given = [one._replace(scale=1 / size) for one, size in zip(given, sizes, strict=True)]
    like = [torch.eye(D_IN, dtype=torch.float64)] * 2
    found = composed(given, [1.0, 1.0], rule_of("ziplora", balance=0.0, steps=400), moments=like)
    close(found, (given[0].matrix() + given[1].matrix()) / 2, "the mean", 1e-3)


def test_a_column_weight_of_1_and_0_is_one_of_the_adapters() -> None:
    given = stacked(3, 2)
    m = torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None].expand(2, D_IN)
    close(zipped(m, given), given[0], "m = (1, 0)", 1e-12)
    loss, _ = loss_and_gradient(m, given, [1.0, 1.0], inputs_of(given, with_moments=False), 5.0)
    apart = given[0] - given[1]
    own = given[1] / given[1].norm()
    assert loss == pytest.approx(float((apart @ own.T).square().sum() / (given[1] @ own.T).square().sum()), rel=1e-9)


def test_columns_of_inputs_that_one_adapter_alone_reads_stay_with_it() -> None:
    """Inputs apart: the weighted sum is right already, and nothing moves."""
    first, second = change(3, 1), change(2, 2)
    first.A[:, 8:], second.A[:, :8] = 0, 0
    given = [first, second]
    wanted = first.matrix() - 0.5 * second.matrix()
    found = composed(given, [1.0, -0.5], rule_of("ziplora", balance=0.0))
    close(found, wanted, "the sum", 1e-9)


@pytest.mark.parametrize("with_moments", [False, True])
def test_the_result_is_better_than_the_sum_and_balance_makes_columns_be_shared_less(*, with_moments: bool) -> None:
    given = changes(3, 2)
    U = left_basis(given)
    matrices = torch.stack([U.T @ one.matrix() for one in given])
    inputs = inputs_of(matrices, with_moments=with_moments)
    generator = torch.Generator()
    shared = []
    for balance in (0.0, 10.0):
        rule = rule_of("ziplora", balance=balance, steps=300)
        M = (
            rule.merge_with(list(matrices), [1.0, 1.0], moments_of(matrices, inputs))
            if with_moments
            else rule.merge(list(matrices), [1.0, 1.0], generator)
        )  # type: ignore[attr-defined]
        # Columns of two independent vectors: m follows from M.
        m = torch.stack([torch.linalg.lstsq(matrices[:, :, j].T, M[:, j]).solution for j in range(D_IN)], 1)
        close(zipped(m, matrices), M, "M = sum_i M_i diag(m_i)", 1e-9)
        ones = torch.ones_like(m)
        assert (
            loss_and_gradient(m, matrices, [1.0, 1.0], inputs, balance)[0]
            < loss_and_gradient(ones, matrices, [1.0, 1.0], inputs, balance)[0] - 1e-3
        )
        shared.append(float((m[0] * m[1]).abs().mean()))
    assert shared[1] < shared[0] / 2
