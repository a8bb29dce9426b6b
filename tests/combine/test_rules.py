"""Every rule: what its equation says, and what holds for all: identity, no dependence on factors or order, weight 0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.combine.compose import COMPOSERS, compose_changes, norm_of_sum
from graftlm.combine.core import Change, right_basis
from graftlm.combine.rules.base import Rule
from graftlm.combine.rules.breadcrumbs import keep_middle
from graftlm.combine.rules.dare import drop
from graftlm.combine.rules.della import keep_probability
from graftlm.combine.rules.lego import center, clusters, units
from graftlm.combine.rules.magnitude import keep_largest
from graftlm.combine.rules.model_stock import share_of_mean
from graftlm.combine.spaces import OF_PRODUCTS, Space
from graftlm.testing.deltas import close
from tests.combine.sites import D_IN, change, changes, composed, in_other_factors, moment, rule_of
from tests.errors import raises

PRUNING: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "dare": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2},
    "magnitude": {"density": 0.5},
    "sce": {"density": 0.5},
    "ties": {"density": 0.5},
    "tsv": {"keep": 0.6},
}
WHOLE: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"density": 1.0, "gamma": 0.0},
    "dare": {"density": 1.0},
    "della": {"density": 1.0},
    "magnitude": {"density": 1.0},
    "ties": {"density": 1.0},
}
"""Options with which nothing is pruned."""
NOT_ITSELF = {"iso-c": "a flat spectrum", "negation": "the opposite"}
"""Rules that make another adapter of one."""
OF_ROTATIONS = ("cat", "iso-c", "karcher", "lego", "linear", "model-stock", "negation", "slerp", "svd", "tsv", "wudi")
"""Rules to which every orthonormal basis is the same."""
RULES = [name for name, row in COMPOSERS.items() if row.rule.spaces != ("factors",)]
IN_SPACES = [(name, space) for name in RULES for space in OF_PRODUCTS]
DRAWS = torch.Generator().manual_seed(0)


def given_for(name: str) -> tuple[list[Change], list[float]]:
    """As many adapters as the rule takes, with weights that it takes."""
    if (most := COMPOSERS[name].rule.most) is not None:
        return changes(3, 2)[:most], [0.7, 0.3]
    if name == "model-stock":  # which is 0 where the adapters have nothing in common
        common, own = change(1, 9, 2.0), changes(3, 2, 4)
        given = [Change(torch.cat([A, common.A]), torch.cat([s * B, common.B], 1)) for A, B, s in own]
        return given, [0.5, 0.8, 1.5]
    return changes(3, 2, 4), [0.5, 0.8, 1.5] if COMPOSERS[name].rule.relative else [1.0, 0.5, -0.7]


def rank_for(name: str, space: Space) -> int:
    """One that cuts; of a flat spectrum no part is more than another, so there is none that determines what is cut."""
    return 9 if name == "iso-c" and space != "ctm" else 5


@pytest.mark.parametrize("space", OF_PRODUCTS)
@pytest.mark.parametrize("name", [name for name in RULES if name not in NOT_ITSELF])
def test_one_adapter_with_weight_1_is_itself(name: str, space: Space) -> None:
    one = change(4, 1, 1.7)
    close(composed([one], [1.0], rule_of(name, **WHOLE.get(name, {})), space, rank=4), one.matrix(), name, 1e-9)


@pytest.mark.parametrize("name", ["ties", "dare", "magnitude"])
def test_one_adapter_is_itself_on_factors_too(name: str) -> None:
    one = change(4, 1, 1.7)
    close(composed([one], [1.0], rule_of(name, density=1.0), "factors"), one.matrix(), name, 1e-9)


def test_the_two_rules_that_make_another_adapter_of_one_do_what_they_say() -> None:
    one = change(4, 1, 1.7)
    close(composed([one], [1.0], rule_of("negation", scale=2.0)), -2 * one.matrix(), "negation", 1e-9)
    flat = torch.linalg.svdvals(composed([one], [1.0], rule_of("iso-c")))
    mean = torch.linalg.svdvals(one.matrix())[:4].mean()
    close(flat[:4], mean.expand(4), "iso-c", 1e-9)
    assert float(flat[4]) < 1e-9


@pytest.mark.parametrize(("name", "space"), IN_SPACES)
def test_other_factors_of_the_same_adapters_give_the_same(name: str, space: Space) -> None:
    given, weights = given_for(name)
    rule = rule_of(name, **PRUNING.get(name, {}))
    other = [in_other_factors(one, seed) for seed, one in enumerate(given)]
    rank = rank_for(name, space)
    wanted = composed(given, weights, rule, space, rank=rank)
    assert float(wanted.norm()) > 0.1
    close(composed(other, weights, rule, space, rank=rank), wanted, f"{name} in {space}")


@pytest.mark.parametrize(("name", "space"), IN_SPACES)
def test_the_order_of_the_adapters_does_not_matter(name: str, space: Space) -> None:
    given, weights = given_for(name)
    rule = rule_of(name, **PRUNING.get(name, {}))
    order = [1, 0] if len(given) == 2 else [2, 0, 1]
    rank = rank_for(name, space)
    permuted = composed([given[i] for i in order], [weights[i] for i in order], rule, space, rank=rank)
    close(permuted, composed(given, weights, rule, space, rank=rank), f"{name} in {space}")


@pytest.mark.parametrize("name", OF_ROTATIONS)
def test_rules_to_which_bases_are_the_same_agree_in_core_knots_and_product_space(name: str) -> None:
    given, weights = given_for(name)
    options = {"energy": 0.9} if name == "svd" else {}
    wanted = composed(given, weights, rule_of(name, **options), "product", rank=13)
    for space in ("core", "knots"):
        close(composed(given, weights, rule_of(name, **options), space), wanted, f"{name} in {space}", 1e-8)  # type: ignore[arg-type]


@pytest.mark.parametrize("space", OF_PRODUCTS)
def test_linear_is_the_dense_sum(space: Space) -> None:
    given, weights = given_for("linear")
    wanted = sum((w * one.matrix() for one, w in zip(given, weights, strict=True)), torch.zeros(()))
    close(composed(given, weights, rule_of("linear"), space, rank=9), wanted, space, 1e-10)


@pytest.mark.parametrize("space", ["core", "product"])
def test_the_error_that_svd_states_is_that_of_the_dense_sum(space: Space) -> None:
    given, weights = given_for("svd")
    total = torch.stack([w * one.matrix() for one, w in zip(given, weights, strict=True)]).sum(0)
    (X, Y, error), _ = compose_changes(given, weights, rule_of("svd"), space, rank=3, generator=DRAWS)
    assert error == pytest.approx(float((total - X @ Y).norm() / total.norm()), rel=1e-2)
    assert error == pytest.approx(float(torch.linalg.svdvals(total)[3:].norm() / total.norm()), rel=1e-6)


# TIES -------------------------------------------------------------------------------------------------------------


def naive_ties(matrices: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Entry by entry."""
    out = torch.zeros_like(matrices[0])
    thresholds = [float(M.abs().flatten().sort(descending=True).values[int(density * M.numel()) - 1]) for M in matrices]
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            votes = [
                (w * float(M[i, j]), abs(w))
                for M, w, t in zip(matrices, weights, thresholds, strict=True)
                if abs(float(M[i, j])) >= t
            ]
            positive = sum(vote for vote, _ in votes) > 0
            agreeing = [(vote, size) for vote, size in votes if (vote > 0) == positive]
            if agreeing:
                out[i, j] = sum(vote for vote, _ in agreeing) / sum(size for _, size in agreeing)
    return out


def test_ties_is_its_definition_entry_by_entry() -> None:
    given, weights = given_for("ties")
    matrices = [one.matrix() for one in given]
    close(
        rule_of("ties", density=0.4).merge(matrices, weights, DRAWS), naive_ties(matrices, weights, 0.4), "ties", 1e-12
    )


def test_in_the_papers_convention_weights_of_ties_matter_by_their_ratio() -> None:
    given = changes(3, 2)
    rule = rule_of("ties", density=0.6)
    once = composed(given, [1.0, 1.0], rule)
    for weight in (0.5, 2.0):
        close(composed(given, [weight, weight], rule), once, f"weights {weight}", 1e-10)
    halved = composed(given, [0.5, 0.5], rule_of("ties", "peft", density=0.6))
    close(halved, composed(given, [1.0, 1.0], rule_of("ties", "peft", density=0.6)) / 2, "PEFT halves", 1e-10)


@pytest.mark.parametrize("convention", ["paper", "peft", "mergekit"])
def test_who_votes_with_weight_0(convention: Any) -> None:
    """PEFT's convention alone lets an adapter of weight 0 vote and dilute."""
    matrices = [one.matrix() for one in changes(3, 2)]
    found = rule_of("ties", convention, density=1.0).merge(matrices, [1.0, 0.0], DRAWS)
    left = float((found * matrices[0]).sum() / matrices[0].square().sum())
    if convention == "peft":
        assert 0.4 < left < 0.9
    else:
        close(found, matrices[0], convention, 1e-12)


def test_frequency_counts_adapters_and_not_sizes() -> None:
    matrices = [torch.tensor([[x]], dtype=torch.float64) for x in (9.0, -1.0, -2.0)]
    weights = [1.0, 1.0, 1.0]
    assert float(rule_of("ties", density=1.0).merge(matrices, weights, DRAWS)) == 9
    assert float(rule_of("ties", density=1.0, majority="frequency").merge(matrices, weights, DRAWS)) == -1.5


# Pruning ----------------------------------------------------------------------------------------------------------


def test_pruning_by_size_keeps_the_largest() -> None:
    M = torch.tensor([[3.0, -5.0, 1.0], [-2.0, 4.0, 0.5]])
    assert keep_largest(M, 2).tolist() == [[0, -5, 0], [0, 4, 0]]
    assert keep_largest(M, 0).tolist() == [[0] * 3] * 2
    assert keep_largest(M, 6) is M


@pytest.mark.parametrize("gamma", [0.0, 0.0005, 0.01, 0.2])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.333, 0.8])
def test_breadcrumbs_keeps_its_share_below_the_outliers(density: float, gamma: float) -> None:
    M = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    kept = keep_middle(M, density, gamma)
    assert int(kept.count_nonzero()) == int(density * 1000)
    sizes = M.abs().flatten().sort(descending=True).values
    largest = sizes[int(gamma * 1000)]
    if density:
        assert float(kept.abs().max()) == float(largest)
        assert torch.equal(kept[kept != 0], M[kept != 0])


@pytest.mark.parametrize(
    "draw",
    [
        lambda M, g: rule_of("dare", density=0.3).merge([M], [1.0], g),
        lambda M, g: rule_of("della", density=0.4, epsilon=0.3, combine="sum").merge([M], [1.0], g),
    ],
    ids=["dare", "della"],
)
def test_the_mean_of_many_draws_is_the_adapter(draw: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    M = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw(M, generator) for _ in range(4000)])
    noise = draws.std(0) / 4000**0.5
    assert float(noise.min()) > 0
    assert float(((draws.mean(0) - M).abs() / noise).max()) < 4


def test_mergekits_l1_norm_is_restored_and_its_mean_is_another() -> None:
    M = (2 * torch.randn(8, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).exp()
    generator = torch.Generator().manual_seed(0)
    keep = torch.full((8, 6), 0.5)
    draws = torch.stack([drop(M, keep, generator, same_sum=True) for _ in range(4000)])
    close(draws.abs().sum((1, 2)), M.sum().expand(4000), "the sum of sizes", 1e-10)
    noise = draws.std(0) / 4000**0.5
    assert float(((draws.mean(0) - M).abs() / noise).max()) > 10


def test_della_keeps_large_entries_of_a_row_more_often() -> None:
    M = torch.tensor([[0.1, -3.0, 2.0], [5.0, 0.0, -1.0]])
    close(keep_probability(M, 0.5, 0.2), torch.tensor([[0.3, 0.7, 0.5], [0.7, 0.3, 0.5]]), "p", 1e-6)
    assert keep_probability(torch.ones(2, 1), 0.5, 0.2).tolist() == [[0.5], [0.5]]


def test_random_rules_repeat_with_a_seed() -> None:
    given = changes(3, 2)
    for name in ("dare", "della"):
        rule = rule_of(name, **PRUNING[name])
        one, same, other = (composed(given, [1.0, 1.0], rule, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


# Directions -------------------------------------------------------------------------------------------------------


def of_one_norm(*ranks: int) -> list[Change]:
    return [one._replace(scale=one.scale / float(one.matrix().norm())) for one in changes(*ranks)]


def test_slerp_goes_from_one_to_the_other_on_the_arc() -> None:
    first, second = of_one_norm(3, 4)
    D1, D2 = first.matrix(), second.matrix()
    angle = torch.acos((D1 * D2).sum())
    for t in (0.25, 0.5, 0.9):
        found = composed([first, second], [1 - t, t], rule_of("slerp"))
        assert float(found.norm()) == pytest.approx(1, abs=1e-10)
        assert float(torch.acos((found * D1).sum())) == pytest.approx(t * float(angle), abs=1e-9)


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_slerp_of_parallel_changes_is_linear(factor: float) -> None:
    one = change(3, 0)
    found = composed([one, one._replace(scale=factor)], [0.25, 0.75], rule_of("slerp"))
    close(found, (0.25 + 0.75 * factor) * one.matrix(), "parallel", 1e-9)


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_the_karcher_mean_of_two_of_one_norm_is_slerp(t: float) -> None:
    given = of_one_norm(3, 4)
    close(composed(given, [1 - t, t], rule_of("karcher")), composed(given, [1 - t, t], rule_of("slerp")), "two", 1e-7)


def test_at_the_karcher_mean_the_tangents_cancel() -> None:
    given, weights = changes(3, 2, 4), [0.2, 0.5, 0.3]
    found = composed(given, weights, rule_of("karcher")).flatten()
    norms = torch.stack([one.matrix().norm() for one in given])
    assert float(found.norm()) == pytest.approx(float((torch.tensor(weights).double() * norms).sum()))
    u, total = found / found.norm(), torch.zeros_like(found)
    for one, weight in zip(given, weights, strict=True):
        v = one.matrix().flatten() / one.matrix().norm()
        away = v - (v @ u) * u
        total += weight * torch.acos(v @ u) * away / away.norm()
    assert float(total.norm()) < 1e-9


def test_opposite_changes_have_no_karcher_mean() -> None:
    one = change(3, 0)
    with raises("adapter/no-mean-direction"):
        composed([one, one._replace(scale=-1.0)], [0.5, 0.5], rule_of("karcher"))


def test_model_stock_lies_between_the_base_and_the_mean() -> None:
    one = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert share_of_mean([one, one, one]) == pytest.approx(1)
    assert share_of_mean([torch.eye(4), one - one.diag().diag()]) == pytest.approx(0, abs=1e-7)
    c = 0.5  # of two unit vectors at 60 degrees
    pair = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.75**0.5]])]
    assert share_of_mean(pair) == pytest.approx(2 * c / (1 + c))
    three = [torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.45, 0.893]]), torch.tensor([[-0.45, -0.893]])]
    assert share_of_mean(three) == 0, "the formula without a bound is negative here"


def test_sce_weighs_by_size_and_erases_the_minority() -> None:
    matrices = [torch.tensor([[3.0, 1.0]]), torch.tensor([[-1.0, 2.0]])]
    found = rule_of("sce", density=1.0).merge(matrices, [0.5, 0.5], DRAWS)
    close(found, torch.tensor([[3.0, (10 * 1 + 5 * 2) / 15]]), "sce", 1e-6)
    assert rule_of("sce", density=0.5).merge(matrices, [0.5, 0.5], DRAWS)[0, 1] == 0, "the entry that varies least"


def test_tsv_makes_the_vectors_of_different_adapters_orthogonal() -> None:
    given = changes(3, 2)
    found = composed(given, [1.0, 1.0], rule_of("tsv"))
    wanted = torch.cat([torch.linalg.svdvals(one.matrix())[: len(one.A)] for one in given]).sort(descending=True).values
    close(torch.linalg.svdvals(found)[:5], wanted, "the singular values are those of all", 1e-9)
    first = change(3, 0)
    twice = composed([first, first], [1.0, 1.0], rule_of("tsv"))
    close(twice, first.matrix(), "one adapter twice", 1e-9)


# Regression -------------------------------------------------------------------------------------------------------


def gradient(D: Tensor, given: list[Change], weights: list[float], moments: list[Tensor]) -> Tensor:
    """Half the gradient of sum_i tr((D - w_i D_i) G_i (D - w_i D_i)^T)."""
    each = zip(given, weights, moments, strict=True)
    return torch.stack([(D - w * one.matrix()) @ G for one, w, G in each]).sum(0)


def of_rows(given: list[Change]) -> list[Tensor]:
    """D_i^T D_i / ||D_i||^2."""
    return [one.matrix().T @ one.matrix() / one.matrix().square().sum() for one in given]


@pytest.mark.parametrize("space", ["core", "knots", "product"])
@pytest.mark.parametrize(("ranks", "ridge"), [((3, 2, 4), 0.0), ((3, 2, 4), 0.1), ((9, 9, 8), 0.0), ((9, 9, 8), 1e-3)])
def test_wudi_is_where_the_gradient_is_zero(ranks: tuple[int, ...], ridge: float, space: Space) -> None:
    given, weights = changes(*ranks), [1.0, 0.5, -0.7]
    found = composed(given, weights, rule_of("wudi", ridge=ridge), space, rank=13)
    moments = [G + ridge * torch.eye(len(G), dtype=G.dtype) for G in of_rows(given)]
    largest = max(float(one.matrix().norm()) for one in given)
    assert float(gradient(found, given, weights, moments).norm()) < 1e-11 * largest
    nearby = found + 1e-3 * change(2, 9).matrix()
    assert float(gradient(nearby, given, weights, moments).norm()) > 1e-6 * largest, "and nowhere else"


def test_with_wudi_each_adapter_is_exact_on_its_own_inputs() -> None:
    given, weights = changes(3, 2, 4), [1.0, 0.5, -0.7]
    (X, Y, _), _ = compose_changes(given, weights, rule_of("wudi", ridge=0.0), "core", rank=None, generator=DRAWS)
    assert X.shape[1] == 3 + 2 + 4
    summed = composed(given, weights, rule_of("linear"))
    for one, weight in zip(given, weights, strict=True):
        close(X @ Y @ one.A.T, weight * one.matrix() @ one.A.T, "on its inputs", 1e-10)
        assert float((summed @ one.A.T - weight * one.matrix() @ one.A.T).norm()) > 0.1, "the sum is not"


def test_wudi_solves_the_equations_that_its_definition_gives() -> None:
    given = changes(9, 9, 8)  # more rows than d_in: the sum of the G_i has an inverse
    moments = of_rows(given)
    D = torch.stack([one.matrix() @ G for one, G in zip(given, moments, strict=True)]).sum(0)
    wanted = D @ torch.linalg.inv(torch.stack(moments).sum(0))
    close(composed(given, [1.0] * 3, rule_of("wudi", ridge=0.0)), wanted, "dense", 1e-9)


def test_the_ridge_of_wudi_bounds_adapters_whose_rows_nearly_coincide() -> None:
    first = change(3, 0)
    second = Change(first.A + 1e-5 * change(3, 2).A, change(3, 1).B)
    largest = max(float(first.matrix().norm()), float(second.matrix().norm()))
    exact = composed([first, second], [1.0, 1.0], rule_of("wudi", ridge=0.0))
    assert float(exact.norm()) > 1e4 * largest
    close(exact @ second.A.T, second.matrix() @ second.A.T, "exact all the same", 1e-7)
    assert float(composed([first, second], [1.0, 1.0], rule_of("wudi")).norm()) < 2 * largest
    mean = (first.matrix() + second.matrix()) / 2
    close(composed([first, second], [1.0, 1.0], rule_of("wudi", ridge=1e9)), mean, "a large ridge", 1e-7)


def inputs(count: int, seed: int) -> Tensor:
    """Inputs of one adapter [count, d_in], of which some features are larger and some depend on each other."""
    random = torch.Generator().manual_seed(100 + seed)
    mixing = torch.randn(D_IN, D_IN, generator=random, dtype=torch.float64) + 3 * torch.eye(D_IN)
    return torch.randn(count, D_IN, generator=random, dtype=torch.float64) @ mixing


def off_diagonal_times(factor: float, moments: list[Tensor]) -> list[Tensor]:
    """Entry by entry."""
    return [
        torch.stack([torch.stack([G[i, j] * (1 if i == j else factor) for j in range(len(G))]) for i in range(len(G))])
        for G in moments
    ]


@pytest.mark.parametrize("space", ["knots", "product"])
@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_regmean_is_the_equation_with_dense_inverses_and_where_the_gradient_is_zero(
    off_diagonal: float, space: Space
) -> None:
    given, weights = changes(3, 2, 4), [1.0, 0.5, -0.7]
    moments = [x.T @ x / len(x) for x in (inputs(count, seed) for seed, count in enumerate((40, 60, 50)))]
    rule = rule_of("regmean", off_diagonal=off_diagonal)
    found = composed(given, weights, rule, space, rank=13, moments=moments)
    scaled = off_diagonal_times(off_diagonal, moments)
    total = torch.stack([w * one.matrix() @ G for one, w, G in zip(given, weights, scaled, strict=True)]).sum(0)
    close(found, total @ torch.linalg.inv(torch.stack(scaled).sum(0)), "dense", 1e-9)
    largest = float(torch.stack(scaled).norm())
    assert float(gradient(found, given, weights, scaled).norm()) < 1e-10 * largest
    nearby = found + 1e-3 * change(2, 9).matrix()
    assert float(gradient(nearby, given, weights, scaled).norm()) > 1e-5 * largest, "and nowhere else"


def test_the_off_diagonals_of_regmean_are_multiplied_by_0_9_by_default() -> None:
    given = changes(3, 2)
    wanted = composed(given, [1.0, 1.0], rule_of("regmean", off_diagonal=0.9))
    close(composed(given, [1.0, 1.0], rule_of("regmean")), wanted, "0.9", 1e-12)
    whole = composed(given, [1.0, 1.0], rule_of("regmean", off_diagonal=1.0))
    assert float((whole - wanted).norm() / wanted.norm()) > 1e-3


def test_regmean_is_the_least_squares_of_all_outputs() -> None:
    """With as many rows for each adapter and whole moments, it is linear regression on the rows of all."""
    given, weights = changes(3, 2, 4), [1.0, 0.5, -0.7]
    rows = [inputs(30, seed) for seed in range(3)]
    outputs = [w * x @ one.matrix().T for one, w, x in zip(given, weights, rows, strict=True)]
    wanted = torch.linalg.lstsq(torch.cat(rows), torch.cat(outputs), driver="gelsd").solution.T
    found = composed(given, weights, rule_of("regmean", off_diagonal=1.0), moments=[x.T @ x / 30 for x in rows])
    close(found, wanted, "regression", 1e-9)


def test_regmean_in_core_space_is_the_best_of_the_rows_that_the_adapters_have() -> None:
    given, weights = changes(3, 2, 4), [1.0, 0.5, -0.7]
    found = composed(given, weights, rule_of("regmean"), "core")
    V, scaled = right_basis(given), off_diagonal_times(0.9, [moment(one) for one in given])
    close(found @ V @ V.T, found, "rows", 1e-10)
    slope = gradient(found, given, weights, scaled)
    assert float((slope @ V).norm()) < 1e-10 * float(slope.norm()), "no other such rows are better"
    assert float((composed(given, weights, rule_of("regmean"), "knots") - found).norm() / found.norm()) > 1e-2


@pytest.mark.parametrize("space", ["core", "knots", "product"])
def test_regmean_with_equal_moments_is_the_mean(space: Space) -> None:
    given, weights = changes(3, 2, 4), [1.0, 0.5, -0.7]
    x = inputs(40, 0)
    found = composed(given, weights, rule_of("regmean"), space, rank=13, moments=[x.T @ x / len(x)] * 3)
    close(found, composed(given, weights, rule_of("linear")) / 3, space, 1e-10)


@pytest.mark.parametrize("space", ["knots", "product"])
def test_where_no_input_goes_regmean_is_the_mean(space: Space) -> None:
    """Fewer rows than inputs: the sum of the moments has no inverse."""
    given, weights = changes(3, 2), [1.0, -0.5]
    mean = composed(given, weights, rule_of("linear")) / 2
    rows = [inputs(4, 0), inputs(5, 1)]
    moments = [x.T @ x / len(x) for x in rows]
    rule = rule_of("regmean", off_diagonal=1.0)
    found = composed(given, weights, rule, space, rank=13, moments=moments)
    scale = float(torch.stack(moments).norm())
    assert float(gradient(found, given, weights, moments).norm()) < 1e-10 * scale
    for one, weight, x in zip(given, weights, rows, strict=True):
        close(found @ x.T, weight * one.matrix() @ x.T, "9 rows for 17 inputs: each is exact on its own", 1e-9)
    unseen = torch.linalg.qr(torch.cat(rows).T, mode="complete").Q[:, 9:]
    close(found @ unseen, mean @ unseen, "elsewhere", 1e-9)
    zeros = [torch.zeros_like(moments[0])] * 2
    close(composed(given, weights, rule, space, rank=13, moments=zeros), mean, "no input at all", 1e-10)


# Clusters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["core", "product"])
@pytest.mark.parametrize("clusters", [9, 40])
def test_lego_with_a_cluster_for_each_unit_is_the_sum(clusters: int, space: Space) -> None:
    given, weights = given_for("lego")
    summed = composed(given, weights, rule_of("linear"))
    found = composed(given, weights, rule_of("lego", clusters=clusters, rescale=False), space, rank=9)
    close(found, summed, "k = sum r", 1e-10)
    close(composed(given, weights, rule_of("lego", clusters=clusters), rank=9), summed * (4 / 9) ** 0.5, "r = 4", 1e-10)
    one = change(3, 0)
    close(composed([one, one], [1.0, 1.0], rule_of("lego", clusters=6, rescale=False)), 2 * one.matrix(), "2", 1e-10)


def test_lego_is_its_definition_on_clusters_that_were_planted() -> None:
    """Five units far from each other, with copies nearby in three adapters, some with both signs changed."""
    random = torch.Generator().manual_seed(0)
    a = 5 * torch.linalg.qr(torch.randn(17, 5, generator=random, dtype=torch.float64)).Q.T
    b = 5 * torch.linalg.qr(torch.randn(13, 5, generator=random, dtype=torch.float64)).Q.T
    near = lambda x: x + 0.1 * torch.randn(x.shape, generator=random, dtype=x.dtype)  # noqa: E731
    units_of = [[0, 1, 2], [2, 3], [0, 2, 4, 1]]
    sizes = torch.tensor([1.0, 1.4, 1.8, 2.2, 2.6], dtype=torch.float64)[:, None]
    given = [Change(near(sizes * a)[ids], near(sizes * b)[ids].T) for ids in units_of]
    members: dict[int, list[Tensor]] = {}
    for one in given:
        P, S, Qh = torch.linalg.svd(one.matrix(), full_matrices=False)
        for j in range(len(one.A)):
            unit = torch.cat([S[j].sqrt() * Qh[j], S[j].sqrt() * P[:, j]])
            overlaps = torch.cat([sizes * a, sizes * b], 1) @ unit / sizes[:, 0]
            planted = int(overlaps.abs().argmax())
            members.setdefault(planted, []).append(overlaps[planted].sign() * unit)
    assert [len(members[planted]) for planted in range(5)] == [2, 2, 3, 1, 1]
    wanted = torch.zeros(13, 17, dtype=torch.float64)
    for each in members.values():
        mean = sum(each, torch.zeros(30, dtype=torch.float64)) / len(each)
        mean = mean / mean.norm() * sum(float(unit.norm()) for unit in each) / len(each)
        wanted += (4 / 5) ** 0.5 * mean[17:, None] * mean[None, :17]
    close(composed(given, [1.0] * 3, rule_of("lego", clusters=5)), wanted, "lego", 1e-10)


@pytest.mark.parametrize("k", [1, 3, 6, 8])
def test_the_clusters_of_lego_are_where_k_means_stops(k: int) -> None:
    pool = torch.cat([units(one.matrix()) for one in changes(3, 2, 4)])
    found = clusters(pool, k)
    assert len(found) == k
    members = torch.cat(found)
    assert sorted(members.norm(dim=1).tolist()) == pytest.approx(sorted(pool.norm(dim=1).tolist()))
    means = torch.stack([one.mean(0) for one in found])
    for number, one in enumerate(found):
        for unit in one:
            both = torch.stack([(unit - means).norm(dim=1), (unit + means).norm(dim=1)])
            assert int(both.argmin()) == number, "of its own cluster and with its own sign"


def test_a_center_of_lego_is_as_long_as_its_units() -> None:
    members = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert float(center(members).norm()) == pytest.approx(2)
    close(center(members) / 2, torch.tensor([3.0, 1.0]) / 10**0.5, "the direction of the mean", 1e-6)


def test_the_units_of_one_adapter_twice_are_its_units() -> None:
    one = change(4, 1, 1.7)
    close(composed([one, in_other_factors(one, 5)], [1.0, 1.0], rule_of("lego")), one.matrix(), "twice", 1e-9)


# PEFT's sum of factors --------------------------------------------------------------------------------------------


def test_peft_linear_has_cross_terms_and_reports_them() -> None:
    given = [change(4, 0), change(4, 1)]
    (B, A, _), cross = compose_changes(given, [0.5, 0.5], rule_of("peft-linear"), "factors", rank=None, generator=DRAWS)
    wanted = 0.5 * given[0].matrix() + 0.5 * given[1].matrix()
    assert cross == pytest.approx(float((B @ A - wanted).norm() / (B @ A).norm()), rel=1e-9)
    assert cross > 0.5
    close(B @ A, (given[0].B + given[1].B) @ (given[0].A + given[1].A) / 2, "by hand", 1e-12)
    other = [in_other_factors(given[0], 0), given[1]]
    moved = composed(other, [0.5, 0.5], rule_of("peft-linear"))
    assert float((moved - B @ A).norm() / (B @ A).norm()) > 0.5, "it depends on how an adapter is written"


def test_factors_of_different_ranks_have_no_sum() -> None:
    with raises("adapter/ranks-differ", match="2, 3"):
        composed(changes(2, 3), [1.0, 1.0], rule_of("peft-linear"))


def test_a_result_on_factors_is_cut_to_a_rank_with_its_error() -> None:
    given = [change(4, 0), change(4, 1)]
    whole = composed(given, [1.0, -0.5], rule_of("peft-linear"))
    (B, A, error), _ = compose_changes(given, [1.0, -0.5], rule_of("peft-linear"), "factors", rank=2, generator=DRAWS)
    assert A.shape[0] == 2
    assert error == pytest.approx(float((whole - B @ A).norm() / whole.norm()), rel=1e-9)


def test_the_norm_of_a_sum_needs_no_dense_matrix() -> None:
    given = changes(3, 2)
    assert norm_of_sum(given) == pytest.approx(float((given[0].matrix() + given[1].matrix()).norm()))


# The table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPOSERS)
def test_every_row_names_itself_its_source_and_where_it_acts(name: str) -> None:
    row = COMPOSERS[name]
    assert row.config(name=name).name == name
    assert issubclass(row.rule, Rule)
    assert row.rule.paper
    assert row.rule.spaces
    assert row.rule.conventions
    with pytest.raises(ValueError, match="unexpected"):
        row.config(name=name, densty=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("della", {"density": 0.9, "epsilon": 0.2}, "between 0 and 1"),
        ("breadcrumbs", {"density": 0.9, "gamma": 0.2}, "more than 1"),
        ("dare", {"density": 0.0}, "greater than 0"),
        ("lego", {"clusters": 0}, "greater than 0"),
        ("tsv", {"keep": 1.5}, "less than or equal to 1"),
        ("wudi", {"ridge": -1.0}, "greater than or equal to 0"),
        ("regmean", {"off_diagonal": -0.1}, "greater than or equal to 0"),
        ("cat", {"learning_rate": 0.0}, "greater than 0"),
        ("ziplora", {"steps": 0}, "greater than 0"),
        ("ziplora", {"balance": -0.1}, "greater than or equal to 0"),
        ("regmean", {"off_diagonal": 1.1}, "less than or equal to 1"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rule_of(name, **options)


def test_lorahub_is_the_product_of_weighted_sums_of_factors() -> None:
    given, weights = [change(3, 1, 2.0), change(3, 2, 0.5), change(3, 3, 1.3)], [0.7, -0.4, 1.2]
    A = sum(w * c.scale**0.5 * c.A for w, c in zip(weights, given, strict=True))
    B = sum(w * c.scale**0.5 * c.B for w, c in zip(weights, given, strict=True))
    close(composed(given, weights, rule_of("lorahub")), B @ A, "the equation", 1e-9)
    close(composed(given, [-w for w in weights], rule_of("lorahub")), B @ A, "signs of all", 1e-9)
    close(composed(given[:1], [0.6], rule_of("lorahub")), 0.36 * given[0].matrix(), "w^2 of one", 1e-9)
    _, cross = compose_changes(given[:1], [0.6], rule_of("lorahub"), "factors", rank=None, generator=DRAWS)
    assert cross == pytest.approx(0.0, abs=1e-7)
    _, cross = compose_changes(given, weights, rule_of("lorahub"), "factors", rank=None, generator=DRAWS)
    apart = B @ A - sum(w**2 * c.matrix() for w, c in zip(weights, given, strict=True))
    assert cross == pytest.approx(float(apart.norm() / (B @ A).norm()))
