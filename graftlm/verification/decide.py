"""What a server's log-probabilities say about what it serves: distances, likelihoods and a verdict. Arithmetic alone.

A hypothesis predicts the log-probability of every token that the server reported. Its distance d is the root of the
mean square of the differences, in nats, each prompt with the same weight. Tokens of one prompt come from one hidden
state, so they count as one observation. With Gaussian noise of a size that nobody knows, and that is therefore
estimated for each hypothesis as its own residual, the log-likelihood of P prompts is, up to a constant,

    -P/2 ln(d^2 + FLOOR^2)

Two hypotheses are told apart where these differ by more than `SURE`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

SURE = math.log(1000)
"""A verdict is 1,000 times as likely as the next best."""

FLOOR = 1e-3
"""Nats. Differences below mean nothing: other kernels and rounded replies make them."""

NEAR = 1.1
"""Factors up to this, and down to its inverse, count as the adapter's own scale."""

NOTHING = 0.02
"""Factors up to this count as the base."""

FEWEST = 6
"""Prompts with an answer below which nothing is decided."""

BASE, ADAPTER = "base", "adapter"

Array = NDArray[np.float64]
Outcome = Literal["applied", "base", "wrong scale", "another adapter", "another template", "undecided"]


class Hypothesis(NamedTuple):
    """What a server may serve."""

    weights: str
    """BASE, ADAPTER, or the name of another adapter."""
    template: str = ""
    """The chat template that the server renders with; empty where the prompt was rendered here."""


class Fit(NamedTuple):
    """How well a hypothesis explains the answers."""

    distance: float
    """Nats; of greedy answers the share of tokens that are not the hypothesis's first choice."""
    log_likelihood: float


class ScaleFit(NamedTuple):
    """The factor on the adapter's change that explains the answers best."""

    factor: float
    low: float
    high: float
    """From `low` to `high` no factor is less likely than the best one by more than the threshold."""
    fit: Fit


@dataclass(frozen=True)
class Decision:
    verdict: Outcome
    why: str
    other: str | None = None
    """The other adapter, or the other template."""


@dataclass(frozen=True)
class Numbers:
    """The log-probabilities that a server reported [K], and the prompt of each, counted from 0 [K]."""

    found: Array
    prompt: NDArray[np.int64]

    @property
    def prompts(self) -> int:
        return len(np.unique(self.prompt))

    def between(self, one: Array, other: Array) -> float:
        """The distance between two predictions [K]."""
        squares = (one - other) ** 2
        each = np.bincount(self.prompt, squares) / np.maximum(np.bincount(self.prompt), 1)
        return math.sqrt(each.sum() / max(self.prompts, 1))

    def fit(self, predicted: Array) -> Fit:
        distance = self.between(self.found, predicted)
        return Fit(distance, -self.prompts / 2 * math.log(distance**2 + FLOOR**2))


# The factor -----------------------------------------------------------------------------------------------------------

LARGEST, SMALLEST = 64.0, 1 / 64
_REFINEMENTS = 6


def fit_scale(numbers: Numbers, predict: Callable[[float], Array], known: Mapping[float, Array]) -> ScaleFit:
    """The factor of the best fit. `predict` computes what the adapter at a factor predicts [K]; `known` has 0 and 1.

    Between computed factors predictions are interpolated; the best place is then computed itself, until it stays.
    """
    points = dict(known)
    for factor in (0.5, 2.0):
        points.setdefault(factor, predict(factor))
    while (best := _best(numbers, points)) == max(points) and best < LARGEST:
        points[2 * best] = predict(2 * best)
    while best == min(each for each in points if each > 0) and best > SMALLEST:
        points[best / 2] = predict(best / 2)
        best = _best(numbers, points)
    for _ in range(_REFINEMENTS):
        best = _between(numbers, points)
        if min(abs(best - each) for each in points) <= max(0.02 * best, NOTHING / 5):
            break
        points[best] = predict(best)
    factors, likelihoods = _curve(numbers, points, _between(numbers, points))
    at = int(likelihoods.argmax())
    possible = likelihoods >= likelihoods[at] - SURE
    low = at - int(np.argmin(possible[at::-1])) + 1 if not possible[: at + 1].all() else 0
    high = at + int(np.argmin(possible[at:])) - 1 if not possible[at:].all() else len(factors) - 1
    return ScaleFit(
        float(factors[at]), float(factors[low]), float(factors[high]), numbers.fit(_at(points, float(factors[at])))
    )


def _best(numbers: Numbers, points: Mapping[float, Array]) -> float:
    return max(points, key=lambda factor: numbers.fit(points[factor]).log_likelihood)


def _between(numbers: Numbers, points: Mapping[float, Array]) -> float:
    """The best factor, with predictions on straight lines between those of computed factors."""
    weights = (1 / np.bincount(numbers.prompt).clip(1))[numbers.prompt]
    found = sorted(points)
    for below, above in pairwise(sorted(points)):
        step = points[above] - points[below]
        length = float(weights @ step**2)
        share = float(weights @ (step * (numbers.found - points[below]))) / length if length > 0 else 0.0
        if 0 < share < 1:
            found.append(below + share * (above - below))
    return max(found, key=lambda factor: numbers.fit(_at(points, factor)).log_likelihood)


def _curve(numbers: Numbers, points: Mapping[float, Array], best: float) -> tuple[Array, Array]:
    """(factors close together, the best one included, and the log-likelihood of each)."""
    fine = [np.linspace(below, above, 41) for below, above in pairwise(sorted({*points, best}))]
    factors = np.unique(np.concatenate(fine))
    return factors, np.array([numbers.fit(_at(points, float(factor))).log_likelihood for factor in factors])


def _at(points: Mapping[float, Array], factor: float) -> Array:
    """The prediction at a factor, on the straight line between its neighbors."""
    below = max(each for each in points if each <= factor)
    above = min(each for each in points if each >= factor)
    share = 0.0 if above == below else (factor - below) / (above - below)
    return (1 - share) * points[below] + share * points[above]


# The verdict ----------------------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """What a hypothesis needs in order to be believed."""

    effect: float
    """The distance between base and adapter on the reported tokens."""
    smallest_effect: float
    """An adapter that changes no more than this cannot be told from its base."""
    distance: float
    """The largest distance of a hypothesis that explains the answers."""
    lead: float = SURE
    """By how much its log-likelihood must lead."""
    unit: str = "nats"


def limits_of(effect: float) -> Limits:
    """Those for log-probabilities. What fits no better than base and adapter fit each other is no explanation."""
    return Limits(effect, FLOOR, math.sqrt(effect**2 / 2 + FLOOR**2))


def decide(
    fits: Mapping[Hypothesis, Fit], scale: ScaleFit | None, limits: Limits, *, expected: Collection[str], prompts: int
) -> Decision:
    """What is served. `expected` are the templates that are right, `scale` is under the template that fits best."""
    if prompts < FEWEST:
        return Decision("undecided", f"only {prompts} prompts have an answer that can be compared; {FEWEST} are needed")
    best = max(fits, key=lambda hypothesis: fits[hypothesis].log_likelihood)
    if best.weights in (BASE, ADAPTER) and limits.effect <= limits.smallest_effect:
        return Decision(
            "undecided",
            f"the adapter changes the answers to these prompts by {_size(limits.effect, limits)}, too little to see: "
            "give prompts on which it acts (--prompts)",
        )
    if scale is not None and scale.fit.log_likelihood - fits[best].log_likelihood > limits.lead:
        if scale.factor > NOTHING and not 1 / NEAR <= scale.factor <= NEAR:
            return _wrong_scale(fits, scale, limits, best.template, expected)
        best = Hypothesis(BASE if scale.factor <= NOTHING else ADAPTER, best.template)
        fits = {**fits, best: scale.fit}  # a factor that counts as the same
    if fits[best].distance > limits.distance:
        return Decision("undecided", _fits_none(fits[best].distance, limits))
    outcomes = {each: _outcome(each, expected) for each in fits}
    rivals = [each for each in fits if outcomes[each] != outcomes[best]]
    rival = max(rivals, key=lambda hypothesis: fits[hypothesis].log_likelihood, default=None)
    if rival is not None and fits[best].log_likelihood - fits[rival].log_likelihood <= limits.lead:
        return Decision(
            "undecided",
            f"{name_of(best)} (distance {_size(fits[best].distance, limits)}) and {name_of(rival)} "
            f"({_size(fits[rival].distance, limits)}) cannot be told apart: they differ by less than the noise. Give "
            "prompts on which they differ (--prompts), or the server's own dtype (--dtype, --quantization)",
        )
    if best.weights == ADAPTER and scale is not None and not (scale.low > 0.5 and scale.high < 2):
        return Decision(
            "undecided",
            f"the adapter is applied, but at which scale is not known: between {scale.low:.2f} and {scale.high:.2f} "
            "of its own. Give the server's own dtype (--dtype, --quantization), or other prompts (--prompts)",
        )
    verdict, other = outcomes[best]
    return Decision(verdict, f"{name_of(best)} explains the answers up to {_size(fits[best].distance, limits)}", other)


def _wrong_scale(
    fits: Mapping[Hypothesis, Fit], scale: ScaleFit, limits: Limits, template: str, expected: Collection[str]
) -> Decision:
    own = [fits[each].distance for each in fits if each.weights in (BASE, ADAPTER) and each.template == template]
    if scale.fit.distance > min(limits.distance, min(own) / 2):
        return Decision("undecided", _fits_none(scale.fit.distance, limits))
    why = f"the adapter at {scale.factor:.2f} of its scale ({scale.low:.2f} to {scale.high:.2f}) explains the answers "
    also = "" if template in expected else f", with another template ({template})"
    return Decision("wrong scale", why + f"up to {_size(scale.fit.distance, limits)}{also}")


def _outcome(hypothesis: Hypothesis, expected: Collection[str]) -> tuple[Outcome, str | None]:
    if hypothesis.weights == BASE:
        return "base", None
    if hypothesis.weights != ADAPTER:
        return "another adapter", hypothesis.weights
    if hypothesis.template not in expected:
        return "another template", hypothesis.template
    return "applied", None


def _fits_none(distance: float, limits: Limits) -> str:
    return (
        f"no hypothesis explains the answers: the best one is off by {_size(distance, limits)}, and base and adapter "
        f"differ by {_size(limits.effect, limits)}. The server may have another base (--base), another adapter "
        "(--other), or a quantized base (--quantization)"
    )


def name_of(hypothesis: Hypothesis) -> str:
    weights = {BASE: "the base", ADAPTER: "the adapter"}.get(hypothesis.weights, hypothesis.weights)
    return weights + (f" with {hypothesis.template} template" if hypothesis.template else "")


def _size(distance: float, limits: Limits) -> str:
    return f"{distance:.2g} nats" if limits.unit == "nats" else f"{distance:.0%} of the tokens"
