"""Weights from a few examples: the optimizers, the loss as a function of weights, and a problem with a known answer."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.load import attach_adapter
from graftlm.adapters.save import adapter_of
from graftlm.combine.compose import compose
from graftlm.combine.few_shot import few_shot_loss
from graftlm.combine.search import BOUND, PENALTY, Found, penalty, search_weights
from graftlm.data.batches.pack import Example, lay_out
from graftlm.model.registry import attachment, hosts
from graftlm.testing import tiny_model
from graftlm.testing.deltas import attach_tiny, ids, logits, perturbed
from tests.errors import raises

BOTH = ["cma", "built in"]


@pytest.fixture
def optimizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cma":
        pytest.importorskip("cma")
    else:
        monkeypatch.setitem(sys.modules, "cma", None)  # its import fails
    return str(request.param)


def with_both(test: Callable[..., None]) -> Any:
    return pytest.mark.parametrize("optimizer", BOTH, indirect=True)(test)


def quadratic(center: Sequence[float]) -> Callable[[Sequence[float]], float]:
    """One minimum, at `center`, of an ill-conditioned function with the penalty taken away."""

    def score(w: Sequence[float]) -> float:
        return sum((1 + 4 * i) * (x - c) ** 2 for i, (x, c) in enumerate(zip(w, center, strict=True))) - penalty(w)

    return score


def trained(method: str = "lora", *, seed: int = 1, base: Any = None, **changes: Any) -> Adapter:
    adapter = adapter_of(perturbed(method, tiny_model() if base is None else base, seed=seed, **changes))
    return replace(adapter, tensors={key: t.detach().clone() for key, t in adapter.tensors.items()})


def several() -> list[Adapter]:
    """Different methods, ranks, scales and sites."""
    return [
        trained(seed=1),
        trained(seed=2, r=2, rslora=True, targets=("q_proj", "down_proj")),
        trained("vera", seed=3),
    ]


def rows(count: int = 3, length: int = 12) -> list[Example]:
    """Random rows; of each the last two thirds of the tokens are supervised, some with half the weight."""
    weights = np.ones(length, np.float32)
    weights[: length // 3], weights[-2:] = 0.0, 0.5
    return [Example(row.astype(np.int32), weights, f"rows:{n}") for n, row in enumerate(ids(7, count, length).numpy())]


def naive_loss(model: Any, examples: Sequence[Example]) -> float:
    """The weighted mean of -log p by the model's own forward pass, a row at a time."""
    total = count = 0.0
    for example in examples:
        with torch.no_grad():
            out = model(torch.from_numpy(example.ids.astype(np.int64))[None]).logits[0].double().log_softmax(1)
        for place in range(1, len(example)):
            total -= float(example.weights[place]) * float(out[place - 1, example.ids[place]])
            count += float(example.weights[place])
    return total / count


def loss_at(weights: Sequence[float], adapters: Sequence[Adapter], **options: Any) -> float:
    with few_shot_loss(tiny_model(), adapters, lay_out(rows(), 100, packed=False), **options) as score:
        return score(weights)


# The search -------------------------------------------------------------------------------------------------------


@with_both
def test_a_minimum_inside_the_bounds_is_found(optimizer: str) -> None:
    found = search_weights(3, quadratic([0.7, -0.2, -1.1]), budget=400, seed=1)
    assert np.abs(np.array(found.weights) - [0.7, -0.2, -1.1]).max() < 0.01
    assert found.by.startswith("CMA-ES (cma " if optimizer == "cma" else "(1+1) evolution strategy")


@with_both
def test_weights_stay_in_the_bounds_and_reach_them(optimizer: str) -> None:
    asked: list[Sequence[float]] = []

    def score(w: Sequence[float]) -> float:
        asked.append(list(w))
        return quadratic([3.0, -2.5])(w)

    found = search_weights(2, score, budget=300, seed=0)
    assert np.abs(asked).max() <= BOUND
    assert np.abs(np.array(found.weights) - [BOUND, -BOUND]).max() < 0.01


@with_both
def test_the_budget_is_kept_the_first_trial_is_0_and_the_best_is_returned(optimizer: str) -> None:
    for budget in (1, 2, 9, 40):
        seen: list[tuple[float, list[float]]] = []

        def score(w: Sequence[float], seen: list[tuple[float, list[float]]] = seen) -> float:
            seen.append((quadratic([0.5, 0.1, 0.9])(w), list(w)))
            return seen[-1][0]

        found = search_weights(3, score, budget=budget, seed=3)
        assert seen[0][1] == [0.0, 0.0, 0.0]
        assert found.evaluations == len(seen) == budget
        assert found.value == min(value + penalty(w) for value, w in seen)
        assert found.value == quadratic([0.5, 0.1, 0.9])(found.weights) + penalty(found.weights)
        assert found.start == seen[0][0] >= found.value


@with_both
def test_the_seed_determines_the_result_and_no_global_state_does_or_changes(optimizer: str) -> None:
    def run(seed: int) -> Found:
        return search_weights(3, quadratic([0.7, -0.2, 0.1]), budget=30, seed=seed)

    np.random.seed(5)
    first, after = run(4), np.random.random()
    np.random.seed(5)
    assert np.random.random() == after
    assert run(4) == first
    assert run(5).weights != first.weights


def test_one_adapter_is_searched_by_the_built_in_strategy() -> None:
    found = search_weights(1, quadratic([-0.8]), budget=100, seed=0)
    assert abs(found.weights[0] + 0.8) < 0.01
    assert found.by == "(1+1) evolution strategy"


def test_the_penalty_is_a_twentieth_of_the_mean_size_and_is_minimized() -> None:
    assert penalty([1.0, -0.5, 0.0, 0.5]) == pytest.approx(0.05 * 2.0 / 4)
    assert PENALTY == 0.05
    # (w - 1)^2 + 0.05 |w| is smallest where 2 (w - 1) = -0.05.
    found = search_weights(1, lambda w: (w[0] - 1) ** 2, budget=200, seed=0)
    assert found.weights[0] == pytest.approx(0.975, abs=2e-3)
    # A score that does not depend on weights: all stay 0.
    assert search_weights(3, lambda w: 1.0, budget=40, seed=0).weights == (0.0, 0.0, 0.0)


@with_both
def test_weights_that_break_the_model_are_the_worst(optimizer: str) -> None:
    def score(w: Sequence[float]) -> float:
        return (nan, inf)[w[1] > 0] if w[0] > 0.6 else quadratic([0.5, 0.2])(w)

    found = search_weights(2, score, budget=300, seed=0)
    assert np.abs(np.array(found.weights) - [0.5, 0.2]).max() < 0.02
    with raises("recipe/unusable-score"):
        search_weights(2, lambda w: nan, budget=10, seed=0)


# The loss as a function of weights --------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_composed_adapter() -> None:
    for weights in ([1.0, 0.5, -0.7], [0.0, 1.5, 0.0], [-1.5, 1.2, 1.5]):
        attach_adapter(model := tiny_model(), compose(tiny_model(), several(), weights=weights).adapter)
        assert loss_at(weights, several()) == pytest.approx(naive_loss(model, rows()), abs=1e-5)


def test_the_loss_in_factor_space_is_that_of_the_rule_lorahub() -> None:
    adapters = [trained(seed=1), trained(seed=2, alpha=9.0), trained(seed=3, targets=("q_proj", "up_proj"))]
    for weights in ([1.0, 0.5, -0.7], [-1.2, 0.3, 0.4]):
        made = compose(tiny_model(), adapters, by="lorahub", weights=weights).adapter
        attach_adapter(model := tiny_model(), made)
        assert loss_at(weights, adapters, space="factors") == pytest.approx(naive_loss(model, rows()), abs=1e-5)
    with raises("adapter/ranks-differ"):
        loss_at([1.0, 1.0], several()[:2], space="factors")


def test_weights_0_are_the_base_and_an_evaluation_does_not_depend_on_those_before() -> None:
    base = naive_loss(tiny_model(), rows())
    for space in ("product", "factors"):
        adapters = [trained(seed=1), trained(seed=2)]
        with few_shot_loss(tiny_model(), adapters, lay_out(rows(), 100, packed=False), space=space) as score:
            first = score([0.4, -1.0])
            assert score([0.0, 0.0]) == pytest.approx(base, abs=1e-6)
            assert score([0.4, -1.0]) == first
            assert abs(first - base) > 1e-3


def test_packs_of_several_rows_give_the_same_loss() -> None:
    weights = [1.0, 0.5, -0.7]
    with few_shot_loss(tiny_model(), several(), lay_out(rows(), 100, packed=True)) as score:
        assert score(weights) == pytest.approx(loss_at(weights, several()), abs=1e-5)


def test_of_one_adapter_weight_w_is_w_of_its_change_and_in_factor_space_w_squared() -> None:
    adapter = trained()
    assert loss_at([0.5], [adapter], space="factors") == pytest.approx(loss_at([0.25], [adapter]), abs=1e-6)
    assert loss_at([-0.5], [adapter], space="factors") == pytest.approx(loss_at([0.25], [adapter]), abs=1e-6)
    attach_adapter(model := tiny_model(), adapter)
    assert loss_at([1.0], [adapter]) == pytest.approx(naive_loss(model, rows()), abs=1e-5)


def test_the_model_is_left_as_it_was_and_its_own_deltas_do_not_act() -> None:
    model = attach_tiny("lora", tiny_model(), delta="own")
    for host in hosts(model).values():
        for parameter in host.deltas.parameters():
            parameter.data.add_(0.1)
    before, names, version = logits(model), set(hosts(model)), attachment(model).factors
    adapter = trained()
    with few_shot_loss(model, [adapter], lay_out(rows(), 100, packed=False)) as score:
        assert score([0.7]) == pytest.approx(loss_at([0.7], [adapter]), abs=1e-6)
    assert torch.equal(logits(model), before)
    assert (set(hosts(model)), attachment(model).factors) == (names, version)
    with few_shot_loss(bare := tiny_model(), [adapter], lay_out(rows(), 100, packed=False)) as score:
        score([1.0])
    assert not hosts(bare)
    assert torch.equal(logits(bare), logits(tiny_model()))


def test_an_adapter_without_factors_needs_a_rank() -> None:
    dora = trained("dora", targets=("q_proj",))
    with raises("target/missing-rank"):
        loss_at([1.0], [dora])
    attach_adapter(model := tiny_model(), dora)
    assert loss_at([1.0], [dora], needs_rank=False) == pytest.approx(naive_loss(model, rows()), abs=1e-5)


# A problem with a known answer ------------------------------------------------------------------------------------


def sampled(model: Any, count: int, length: int) -> list[Example]:
    """Rows that a model writes by itself, after one random token each."""
    generator, tokens = torch.Generator().manual_seed(0), ids(3, count, 1)
    for _ in range(length - 1):
        with torch.no_grad():
            p = model(tokens).logits[:, -1].softmax(1)
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], dim=1)
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return [Example(row.astype(np.int32), weights, f"sampled:{n}") for n, row in enumerate(tokens.numpy())]


def telling() -> Any:
    """A tiny model whose distributions are far from uniform, so that rows tell which weights wrote them."""
    return tiny_model(initializer_range=0.2)


@pytest.mark.slow
@with_both
def test_the_weights_that_made_the_rows_are_found(optimizer: str) -> None:
    adapters = [trained(seed=seed, base=telling()) for seed in (1, 2, 3)]
    attach_adapter(target := telling(), compose(telling(), adapters, weights=[0.7, 0.0, -0.4]).adapter)
    examples = sampled(target, 24, 40)
    with few_shot_loss(telling(), adapters, lay_out(examples, 2000, packed=True)) as score:
        found = search_weights(3, score, budget=100, seed=0)
        loss = score(found.weights)
    assert np.abs(np.array(found.weights) - [0.7, 0.0, -0.4]).max() < 0.1
    assert found.value == pytest.approx(loss + penalty(found.weights))
    assert loss == pytest.approx(naive_loss(target, examples), abs=0.01)
    assert found.value < found.start - 0.2
