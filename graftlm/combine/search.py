"""Weights of adapters from a few examples, without gradients.

LoraHub: Huang et al. 2023, arXiv:2307.13269, stage `adapt`.

    min over w in [-1.5, 1.5]^n of score(w) + 0.05 mean_i |w_i|        from w = 0

score(w) is the mean loss of the composed adapter on the examples, in nats per supervised token. What w composes is the
scorer's business (`few_shot.py`): by default sum_i w_i D_i, in the paper (sum_i w_i B_i)(sum_i w_i A_i).

The released code minimizes with NGOpt of nevergrad. Here it is CMA-ES (Hansen and Ostermeier 2001) of the package
`cma`, which a plain install does not bring: `pip install 'graftlm[compose]'`. Without it, and for one adapter, for
which CMA-ES is not made, it is the strategy in `evolution.py`. The result says which it was.
"""

from collections.abc import Callable, Sequence
from math import inf, isfinite, nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from graftlm.combine.evolution import one_plus_one
from graftlm.errors import RecipeError

BOUND = 1.5
"""Weights are in [-BOUND, BOUND]."""
STEP = BOUND / 3
"""The standard deviation of the first trials: a sixth of the range."""
PENALTY = 0.05

Score = Callable[[Sequence[float]], float]
"""Weights -> what is to be small."""


class Found(NamedTuple):
    """The best weights that a search has seen."""

    weights: tuple[float, ...]
    """One for each adapter."""
    value: float
    """score(w) + penalty(w)."""
    evaluations: int
    """How often the score was computed."""
    by: str
    """The optimizer."""
    start: float
    """The value of weights 0, which is the score of the base alone."""


def penalty(weights: Sequence[float]) -> float:
    """0.05 mean |w|."""
    # As in the paper, beside the mean loss. The released code divides the mean loss by the number of rows once more, so
    # its penalty counts 5-fold with 5 rows.
    return PENALTY * sum(map(abs, weights)) / len(weights)


def search_weights(n: int, score: Score, *, budget: int, seed: int) -> Found:
    """The weights of n adapters with the smallest score and penalty that `budget` evaluations find.

    The first evaluation is that of weights 0, so the result is never worse than the base. The same seed gives the same
    result. Raises RecipeError for a score of weights 0 that is not finite.
    """
    assert n > 0
    assert budget > 0
    objective = _Objective(score)
    start = objective(np.zeros(n))
    if not isfinite(start):
        raise RecipeError(
            "search: the loss of the base on the examples is not finite, so no weights are better than others: look at "
            "the rows, or load the base in float32",
            code="unusable-score",
        )
    by = _minimize(objective, start, n, budget - 1, seed)
    return Found(tuple(objective.best.tolist()), objective.value, objective.evaluations, by, start)


class _Objective:
    """score + penalty, and the best of what it was called with."""

    def __init__(self, score: Score) -> None:
        self.score, self.evaluations = score, 0
        self.best: NDArray[np.float64] = np.empty(0)
        self.value = inf

    def __call__(self, w: NDArray[np.float64]) -> float:
        weights = w.tolist()
        value = self.score(weights) + penalty(weights)
        value = value if isfinite(value) else inf  # weights that break the model: the worst of all
        self.evaluations += 1
        if value < self.value or self.evaluations == 1:
            self.best, self.value = w.copy(), value
        return value


def _minimize(objective: _Objective, start: float, n: int, evaluations: int, seed: int) -> str:
    """Call the objective at most so many times; returns the name of the optimizer."""
    try:
        import cma
    except ImportError:
        cma = None
    if cma is None or n == 1:
        one_plus_one(objective, [0.0] * n, value=start, step=STEP, bound=BOUND, evaluations=evaluations, seed=seed)
        return "(1+1) evolution strategy"
    random = np.random.default_rng(seed)
    options: dict[str, Any] = {
        "bounds": [-BOUND, BOUND],
        "randn": lambda *shape: random.standard_normal(shape),
        "seed": nan,  # it would seed numpy's global generator
        "verbose": -9,
    }
    strategy = cma.CMAEvolutionStrategy([0.0] * n, STEP, options)
    while evaluations and not strategy.stop():
        trials = strategy.ask()
        values = [objective(trial) for trial in trials[:evaluations]]
        evaluations -= len(values)
        if len(values) == len(trials):
            strategy.tell(trials, values)
    return f"CMA-ES (cma {cma.__version__})"
