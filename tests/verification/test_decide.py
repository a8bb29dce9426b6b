"""Verdicts from numbers that are made up: a known truth, noise of a known size, and what may be concluded."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from graftlm.verification.decide import (
    ADAPTER,
    BASE,
    FLOOR,
    NEAR,
    SURE,
    Array,
    Decision,
    Fit,
    Hypothesis,
    Numbers,
    ScaleFit,
    decide,
    fit_scale,
    limits_of,
)

PROMPTS, TOKENS = 20, 10
PROMPT = np.repeat(np.arange(PROMPTS), TOKENS)


def curve(effect: float, seed: int = 0) -> Callable[[float], Array]:
    """Log-probabilities as a function of the factor: logits that move along a line, normalized over 40 tokens."""
    generator = np.random.default_rng(seed)
    logits, change = generator.normal(size=(2, PROMPTS, 40)) * np.array([2.0, effect])[:, None, None]

    def predict(factor: float) -> Array:
        moved = logits + factor * change
        found: Array = moved - np.log(np.exp(moved).sum(1, keepdims=True))
        return found[:, :TOKENS].ravel()

    return predict


def noise(size: float, seed: int = 1) -> Array:
    """Half of it the same for all tokens of a prompt."""
    generator = np.random.default_rng(seed)
    shared = np.repeat(generator.normal(size=PROMPTS), TOKENS)
    made: Array = size * (shared + generator.normal(size=PROMPTS * TOKENS)) / math.sqrt(2)
    return made


def verdict(found: Array, predict: Callable[[float], Array], **others: Array) -> tuple[Decision, ScaleFit]:
    numbers = Numbers(found, PROMPT)
    base, adapter = predict(0), predict(1)
    predictions = {BASE: base, ADAPTER: adapter, **others}
    fits = {Hypothesis(name): numbers.fit(each) for name, each in predictions.items()}
    scale = fit_scale(numbers, predict, {0.0: base, 1.0: adapter})
    limits = limits_of(numbers.between(base, adapter))
    return decide(fits, scale, limits, expected=("",), prompts=numbers.prompts), scale


def test_a_distance_weighs_prompts_and_not_tokens() -> None:
    numbers = Numbers(np.array([1.0, 0, 0, 0]), np.array([0, 1, 1, 1]))
    assert numbers.prompts == 2
    assert numbers.fit(np.zeros(4)).distance == pytest.approx(math.sqrt(0.5))
    assert numbers.fit(np.zeros(4)).log_likelihood == pytest.approx(-math.log(0.5 + FLOOR**2))


@pytest.mark.parametrize("factor", [0.03, 0.125, 0.25, 0.5, 0.7, 1, 1.4, 2, 4, 8, 16])
@pytest.mark.parametrize("size", [0, 0.02, 0.1])
def test_the_factor_is_found_within_a_tenth_wherever_noise_allows_it(factor: float, size: float) -> None:
    predict = curve(0.6)
    numbers = Numbers(predict(factor) + noise(size), PROMPT)
    found = fit_scale(numbers, predict, {0.0: predict(0), 1.0: predict(1)})
    assert found.low <= found.factor <= found.high
    assert found.low <= factor * 1.02
    assert found.high >= factor * 0.98
    if size == 0 or factor >= 0.5:
        assert found.factor == pytest.approx(factor, rel=0.1)


def test_a_factor_is_found_with_few_passes() -> None:
    predict, asked = curve(0.6), list[float]()
    numbers = Numbers(predict(1) + noise(0.05), PROMPT)
    fit_scale(numbers, lambda factor: asked.append(factor) or predict(factor), {0.0: predict(0), 1.0: predict(1)})  # type: ignore[func-returns-value]
    assert len(asked) <= 5
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("size", [0, 0.02, 0.1, 0.2])
def test_the_truth_is_named_and_nothing_else(seed: int, size: float) -> None:
    predict, another = curve(0.8, seed), curve(0.8, seed + 100)
    of_another = predict(0) + another(1) - another(0)
    named = {
        "applied": predict(1),
        "base": predict(0),
        "another adapter": of_another,
        "wrong scale": predict(0.5),
    }
    for wanted, truth in named.items():
        found, scale = verdict(truth + noise(size, seed), predict, second=of_another)
        assert found.verdict == wanted, found
        assert found.other == ("second" if wanted == "another adapter" else None)
        if wanted == "wrong scale":
            assert scale.factor == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("seed", range(10))
def test_an_adapter_that_nobody_named_is_never_taken_for_base_or_adapter(seed: int) -> None:
    predict, another = curve(0.8, seed), curve(0.8, seed + 100)
    found, _ = verdict(predict(0) + another(1) - another(0), predict)
    assert found.verdict == "undecided"
    assert "no hypothesis explains" in found.why


@pytest.mark.parametrize("truth", [0, 1])
def test_noise_as_large_as_the_effect_decides_nothing(truth: int) -> None:
    for seed in range(10):
        predict = curve(0.1, seed)
        assert verdict(predict(truth) + noise(0.2, seed), predict)[0].verdict == "undecided"


def test_an_adapter_without_effect_is_not_applied_and_not_missing() -> None:
    predict = curve(1e-5)
    found, _ = verdict(predict(1), predict)
    assert found.verdict == "undecided"
    assert "too little" in found.why


def test_a_factor_within_a_tenth_is_the_adapter() -> None:
    predict = curve(0.8)
    assert verdict(predict(1 / NEAR + 0.02), predict)[0].verdict == "applied"
    assert verdict(predict(1 / NEAR - 0.02), predict)[0].verdict == "wrong scale"
    assert verdict(predict(NEAR + 0.02), predict)[0].verdict == "wrong scale"


def test_few_prompts_decide_nothing() -> None:
    predict = curve(0.8)
    fits = {Hypothesis(BASE): Fit(1, -5), Hypothesis(ADAPTER): Fit(0, 50)}
    assert decide(fits, None, limits_of(1), expected=("",), prompts=5).verdict == "undecided"
    assert decide(fits, None, limits_of(1), expected=("",), prompts=6).verdict == "applied"
    assert predict(0).shape == PROMPT.shape


def test_a_scale_that_is_not_known_is_not_called_right() -> None:
    fits = {Hypothesis(BASE): Fit(1, -50), Hypothesis(ADAPTER): Fit(0.1, 50)}
    wide, narrow = (ScaleFit(1.1, low, 1.5, Fit(0.1, 50)) for low in (0.4, 0.6))
    assert decide(fits, wide, limits_of(1), expected=("",), prompts=20).verdict == "undecided"
    assert decide(fits, narrow, limits_of(1), expected=("",), prompts=20).verdict == "applied"


def test_a_template_is_a_part_of_the_hypothesis() -> None:
    own, other = "the adapter's", "the base's"
    fits = {Hypothesis(w, t): Fit(1, -50) for w in (BASE, ADAPTER) for t in (own, other)}
    right = {**fits, Hypothesis(ADAPTER, own): Fit(0.1, 50)}
    wrong = {**fits, Hypothesis(ADAPTER, other): Fit(0.1, 50)}
    close = {**wrong, Hypothesis(ADAPTER, own): Fit(0.1, 50 - SURE + 0.1)}
    both_bases = {**fits, Hypothesis(BASE, own): Fit(0.1, 50), Hypothesis(BASE, other): Fit(0.1, 49)}
    for made, wanted, named in (
        (right, "applied", None),
        (wrong, "another template", other),
        (close, "undecided", None),
        (both_bases, "base", None),
    ):
        found = decide(made, None, limits_of(1), expected=(own,), prompts=20)
        assert (found.verdict, found.other) == (wanted, named)
