"""Many adapters over shared bases: the error is the stated one, it is as small as it can be, and bytes are counted."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from graftlm.combine.changes import changes_of
from graftlm.combine.compress import Compressed, compress, compress_changes
from graftlm.combine.core import Change
from graftlm.model.registry import hosts
from graftlm.testing import tiny_model
from graftlm.testing.deltas import close
from tests.combine.sites import D_IN, D_OUT, change, changes, in_other_factors
from tests.combine.test_compose import answers, trained
from tests.errors import raises

FORMS = pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])


def loss(given: list[Change], made: Compressed) -> float:
    """sum_i ||D_i - U S_i V^T||^2 / ||D_i||^2, dense."""
    lost = [(one.matrix() - made.change(i).matrix()).norm() / one.matrix().norm() for i, one in enumerate(given)]
    return float(torch.stack(lost).square().sum())


@FORMS
@pytest.mark.parametrize("k", [9, 12])
def test_with_the_sum_of_the_ranks_nothing_is_lost(k: int, diagonal: bool) -> None:
    given = changes(3, 2, 4)
    made = compress_changes(given, k, diagonal=diagonal)
    assert max(made.errors) < 1e-12
    for i, one in enumerate(given):
        close(made.change(i).matrix(), one.matrix(), f"adapter {i}", 1e-10)
        assert torch.equal(made.change(i).A, made.bases[0].V.T), "A is shared"


@FORMS
def test_steps_that_end_sooner_state_their_error_too_and_are_nearly_as_good(diagonal: bool) -> None:
    given = changes(3, 2, 4)
    whole, soon = (compress_changes(given, 3, diagonal=diagonal, tolerance=tolerance) for tolerance in (1e-12, 1e-3))
    assert loss(given, whole) < loss(given, soon) < 1.05 * loss(given, whole)
    assert loss(given, soon) == pytest.approx(sum(error**2 for error in soon.errors), rel=1e-9)


@FORMS
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_stated_error_is_that_of_the_dense_changes(k: int, diagonal: bool) -> None:
    given = changes(3, 2, 4)
    made = compress_changes(given, k, diagonal=diagonal)
    assert [(tuple(U.shape), tuple(V.shape)) for U, V in made.bases] == [((D_OUT, k), (D_IN, k))]
    for i, one in enumerate(given):
        lost = (one.matrix() - made.change(i).matrix()).norm() / one.matrix().norm()
        assert made.errors[i] == pytest.approx(float(lost), rel=1e-9)
        assert 0.01 < made.errors[i] < 1


@pytest.mark.parametrize("k", [1, 3, 6])
def test_in_the_full_form_the_residual_is_what_the_cores_do_not_hold(k: int) -> None:
    given = changes(3, 2, 4)
    made = compress_changes(given, k)
    for basis in made.bases[0]:
        close(basis.T @ basis, torch.eye(k, dtype=torch.float64), "orthonormal", 1e-12)
    of_one_norm = [S.square().sum() / one.matrix().square().sum() for S, one in zip(made.cores, given, strict=True)]
    assert loss(given, made) / 3 == pytest.approx(1 - float(torch.stack(of_one_norm).sum()) / 3, rel=1e-10)
    for i, one in enumerate(given):
        close(made.cores[i], made.bases[0].U.T @ one.matrix() @ made.bases[0].V, "U^T D V", 1e-10)


@pytest.mark.parametrize(("diagonal", "k"), [(False, 2), (False, 5), (True, 2), (True, 3)])
def test_no_small_change_of_the_bases_has_a_smaller_loss(diagonal: bool, k: int) -> None:
    """The gradient of the dense loss, with the best S_i for each U and V, by autograd. (From rank 4 on, the diagonal
    form of these adapters has not converged after ROUNDS.)"""
    given = changes(3, 2, 4)
    made = compress_changes(given, k, diagonal=diagonal)
    D = torch.stack([one.matrix() / one.matrix().norm() for one in given])

    def dense(U: Tensor, V: Tensor) -> Tensor:
        if not diagonal:
            U, V = torch.linalg.qr(U).Q, torch.linalg.qr(V).Q
            return (D - U @ (U.T @ D @ V) @ V.T).square().sum()
        products = torch.einsum("pk,qk->kpq", U, V).flatten(1).T
        return (D.flatten(1).T - products @ torch.linalg.pinv(products) @ D.flatten(1).T).square().sum()

    with torch.enable_grad():
        U, V = (basis.clone().requires_grad_() for basis in made.bases[0])
        value = dense(U, V)
        value.backward()
    assert float(value.detach()) == pytest.approx(loss(given, made), rel=1e-9)
    assert U.grad is not None
    assert V.grad is not None
    assert float(torch.cat([U.grad, V.grad]).norm()) < 1e-4
    random = torch.Generator().manual_seed(0)
    for _ in range(5):
        away = [basis + 0.05 * torch.randn(basis.shape, generator=random, dtype=basis.dtype) for basis in made.bases[0]]
        assert float(dense(*away)) > float(value.detach())


@FORMS
def test_the_loss_falls_with_the_rank_and_with_clusters(diagonal: bool) -> None:
    given = changes(3, 2, 4, 3)
    by_rank = [loss(given, compress_changes(given, k, diagonal=diagonal)) for k in range(1, 13)]
    assert all(larger > smaller for larger, smaller in pairwise(by_rank))
    by_clusters = [loss(given, compress_changes(given, 3, diagonal=diagonal, clusters=c)) for c in (1, 2, 4)]
    assert all(larger > smaller for larger, smaller in pairwise(by_clusters))


@FORMS
@pytest.mark.parametrize("k", [1, 2])
def test_one_adapter_alone_is_cut_as_by_its_svd(k: int, diagonal: bool) -> None:
    one = change(4, 1, 1.7)
    P, S, Qh = torch.linalg.svd(one.matrix(), full_matrices=False)
    made = compress_changes([one], k, diagonal=diagonal)
    close(made.change(0).matrix(), P[:, :k] * S[:k] @ Qh[:k], "Eckart and Young", 1e-9)


@FORMS
def test_a_large_adapter_does_not_rule(diagonal: bool) -> None:
    given = changes(3, 2, 4)
    scaled = [given[0]._replace(scale=1e6), *given[1:]]
    made, again = (compress_changes(some, 4, diagonal=diagonal) for some in (given, scaled))
    assert again.errors == pytest.approx(made.errors, rel=1e-6)


@FORMS
def test_neither_factors_nor_order_change_the_result(diagonal: bool) -> None:
    given = changes(3, 2, 4)
    made = compress_changes(given, 4, diagonal=diagonal, clusters=2)
    other = [in_other_factors(given[i], i) for i in (2, 0, 1)]
    again = compress_changes(other, 4, diagonal=diagonal, clusters=2)
    for place, i in enumerate((2, 0, 1)):
        close(again.change(place).matrix(), made.change(i).matrix(), f"adapter {i}", 1e-6)


@FORMS
def test_clusters_find_adapters_that_share_their_bases(diagonal: bool) -> None:
    """Five adapters over three planted pairs of bases, which are found without an error."""
    random = torch.Generator().manual_seed(0)
    planted = [change(3, seed) for seed in range(3)]
    given = []
    for which in (0, 1, 2, 1, 0):
        S = torch.randn(3, 3, generator=random, dtype=torch.float64)
        S = S.diag().diag() if diagonal else S
        given.append(Change(planted[which].A, planted[which].B @ S))
    made = compress_changes(given, 3, diagonal=diagonal, clusters=3)
    assert max(made.errors) < 1e-5
    first, second, third, *rest = made.cluster
    assert len({first, second, third}) == 3
    assert rest == [second, first]


def test_adapters_that_share_A_have_fewer_dimensions_there() -> None:
    first = change(3, 0)
    made = compress_changes([first, Change(first.A, change(3, 1).B)], 6)
    assert max(made.errors) < 1e-12
    assert [tuple(t.shape) for t in made.bases[0]] == [(D_OUT, 6), (D_IN, 3)]
    assert made.numbers == D_OUT * 6 + D_IN * 3 + 2 * 6 * 3


@FORMS
def test_no_change_stays_none(diagonal: bool) -> None:
    nothing = Change(torch.zeros(2, D_IN), torch.zeros(D_OUT, 2))
    made = compress_changes([nothing, change(3, 0)], 3, diagonal=diagonal)
    assert not made.change(0).matrix().any()
    assert made.errors == pytest.approx([0, 0], abs=1e-10)


# Whole adapters ---------------------------------------------------------------------------------------------------


def test_adapters_are_loras_that_answer_as_before_where_nothing_is_lost() -> None:
    given = [trained("lora", targets=("q_proj", "up_proj"), seed=1), trained("dora", targets=("q_proj",), seed=2)]
    given.append(trained("lora", targets=("up_proj",), seed=3))
    model = tiny_model()
    made = compress(model, given, rank=64)
    assert not hosts(model), "the model is as it was"
    for before, after in zip(given, made.adapters, strict=True):
        assert after.config is not None
        assert after.config.method == "lora"
        close(answers(after), answers(before), str(before.config))
    for site, report in made.sites.items():
        assert list(report.errors) == ([0, 1] if "q_proj" in site else [0, 2])
        assert max(report.errors.values()) < 1e-10


def test_bytes_are_those_of_the_bases_and_the_cores() -> None:
    given = [trained("lora", targets=("q_proj",), seed=seed) for seed in (1, 2, 3, 4)]
    model, r = tiny_model(), given[0].config.r
    made, small = (compress(model, given, rank=4, diagonal=diagonal) for diagonal in (False, True))
    with changes_of(model, made.adapters[0], "unused", needs_rank=True) as first:
        for site, report in made.sites.items():
            d_in, d_out = first[site]().A.shape[1], len(first[site]().B)
            assert report.bytes_before == 4 * 4 * r * (d_in + d_out)
            assert report.bytes == 4 * (4 * (d_in + d_out) + 4 * 16)
            assert small.sites[site].bytes == 4 * (4 * (d_in + d_out) + 4 * 4)
            with changes_of(model, made.adapters[1], "unused", needs_rank=True) as second:
                assert torch.equal(first[site]().A, second[site]().A), "V is shared"


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2, "clusters": 0}])
def test_a_rank_and_a_number_of_clusters_are_1_or_more(options: dict[str, int]) -> None:
    with raises("recipe/unusable-settings", match="1 or more"):
        compress(tiny_model(), [trained("lora", targets=("q_proj",))], **options)
    with raises("recipe/unusable-settings", match="0 adapters"):
        compress(tiny_model(), [], rank=2)
