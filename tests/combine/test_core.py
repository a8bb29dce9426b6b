"""Core space holds every change of a site without loss, in a basis that depends on the changes alone."""

import pytest
import torch
from torch import Tensor

from graftlm.combine.core import Change, factorize, in_basis, left_basis, right_basis
from graftlm.combine.spaces import OF_PRODUCTS, Space, coordinates
from tests.combine.sites import D_IN, D_OUT, change, changes, in_other_factors


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("ranks", [(3,), (2, 4, 1), (9, 9), (1, 1, 1, 1)])
def test_core_space_is_lossless_and_as_small_as_the_ranks(ranks: tuple[int, ...]) -> None:
    given = changes(*ranks)
    U, V = left_basis(given), right_basis(given)
    assert U.shape == (D_OUT, min(D_OUT, sum(ranks)))
    assert V.shape == (D_IN, min(D_IN, sum(ranks)))
    for basis in (U, V):
        assert apart(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64)) < 1e-13
    for one in given:
        assert apart(U @ in_basis(one, U, V) @ V.T, one.matrix()) < 1e-12


def test_the_basis_is_that_of_the_stacked_products_the_largest_singular_value_first() -> None:
    given = changes(2, 3)
    U, V = left_basis(given), right_basis(given)
    for basis, stacked in (
        (U, torch.cat([one.matrix() for one in given], 1)),
        (V, torch.cat([c.matrix().T for c in given], 1)),
    ):
        P, S, _ = torch.linalg.svd(stacked, full_matrices=False)
        for column in range(5):
            assert abs(float(basis[:, column] @ P[:, column])) == pytest.approx(1, abs=1e-10)
        assert (S[:4] > S[1:5]).all()
        assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all(), "signs are fixed"


def test_neither_factors_nor_order_change_the_basis() -> None:
    given = changes(2, 4, 3)
    other = [in_other_factors(one, seed) for seed, one in enumerate(given)][::-1]
    for basis in (left_basis, right_basis):
        assert apart(basis(other), basis(given)) < 1e-9


def test_adapters_that_share_A_take_no_dimensions_twice() -> None:
    first = change(3, 0)
    second = Change(first.A, change(3, 1).B)
    assert left_basis([first, second]).shape[1] == 6
    assert right_basis([first, second]).shape[1] == 3


def test_adapters_that_cancel_each_other_are_held_all_the_same() -> None:
    one = change(3, 0)
    U, V = left_basis([one, one._replace(scale=-1.0)]), right_basis([one, one._replace(scale=-1.0)])
    assert U.shape[1] == V.shape[1] == 3
    assert apart(U @ in_basis(one, U, V) @ V.T, one.matrix()) < 1e-12


@pytest.mark.parametrize("space", OF_PRODUCTS)
def test_every_space_of_products_leads_back_to_the_change(space: Space) -> None:
    given = changes(2, 4)
    at = coordinates(given, space, rank=6)
    assert at.lost == 0
    for M, one in zip(at.matrices, given, strict=True):
        X, Y, error = at.factorize(M, None, 1.0)
        assert error == 0
        assert X.shape[1] == len(one.A), "of the smallest rank"
        assert apart(X @ Y, one.matrix()) < 1e-12


def test_ctm_states_what_is_outside_of_its_subspace() -> None:
    given = changes(3, 4)
    at = coordinates(given, "ctm", rank=2)
    U, V = at.U, at.V
    assert U is not None
    assert V is not None
    assert [tuple(M.shape) for M in at.matrices] == [(2, 2)] * 2
    outside = sum(float((c.matrix() - U @ M @ V.T).square().sum()) for c, M in zip(given, at.matrices, strict=True))
    whole = sum(float(c.matrix().square().sum()) for c in given)
    assert at.lost == pytest.approx((outside / whole) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_stated_error_is_the_frobenius_error(rank: int) -> None:
    M = changes(6)[0].matrix()
    X, Y, error = factorize(M, rank)
    assert X.shape[1] == rank
    assert error == pytest.approx(float((M - X @ Y).norm() / M.norm()), rel=1e-9)
    cut = torch.linalg.svdvals(M)[rank:]
    assert error * float(M.norm()) == pytest.approx(float(cut.square().sum().sqrt()), rel=1e-6)


def test_energy_keeps_the_smallest_rank_that_has_it() -> None:
    M = changes(6)[0].matrix()
    S = torch.linalg.svdvals(M).square()
    for energy in (0.3, 0.9, 0.999):
        X, Y, error = factorize(M, None, energy)
        r = X.shape[1]
        assert S[:r].sum() / S.sum() >= energy
        assert S[: r - 1].sum() / S.sum() < energy
        assert error == pytest.approx(float((M - X @ Y).norm() / M.norm()), rel=1e-9)


def test_no_change_is_a_rank_of_one_with_zeros() -> None:
    X, Y, error = factorize(torch.zeros(4, 5, dtype=torch.float64), 3)
    assert X.shape == (4, 1)
    assert not (X @ Y).any()
    assert error == 0
    nothing = Change(torch.zeros(2, D_IN), torch.zeros(D_OUT, 2))
    assert not coordinates([nothing], "core").matrices[0].any()
