"""The (1+1) evolution strategy with the 1/5 success rule (Rechenberg 1973): a minimum without gradients.

    y = x + s z        z ~ N(0, I), n numbers        x <- y if f(y) <= f(x)
    ln s <- ln s + (success - 1/5) / (d (1 - 1/5))   success 1 or 0, d = sqrt(n + 1)

So the step s stays where one of five trials succeeds. Trials are clipped to the bounds.
"""

from collections.abc import Callable, Sequence
from math import exp, sqrt

import numpy as np
from numpy.typing import NDArray


def one_plus_one(
    objective: Callable[[NDArray[np.float64]], float],
    start: Sequence[float],
    *,
    value: float,
    step: float,
    bound: float,
    evaluations: int,
    seed: int,
) -> None:
    """Call `objective` so many times, on vectors [n] in [-bound, bound]^n, from `start`, where it is `value`.

    Returns nothing: the objective remembers what it was called with.
    """
    random, damping = np.random.default_rng(seed), sqrt(len(start) + 1)
    x = np.array(start, np.float64)
    for _ in range(evaluations):
        y = np.clip(x + step * random.standard_normal(len(x)), -bound, bound)
        found = objective(y)
        success = found <= value
        if success:
            x, value = y, found
        step *= exp((success - 0.2) / (0.8 * damping))
