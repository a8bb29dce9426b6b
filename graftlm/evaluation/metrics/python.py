"""A metric of the user's own: `{python: metrics.py:score}`, the mean of a function of one answer.

    def score(said) -> float | None:            # metrics.py
        return float(said.text.isupper())

`said` is a `graftlm.evaluation.metrics.base.Answer` (`text`, `references`, `prompt`, `fields`, `where`), a `Choice` or
a `Likelihood`, as the kind of the task has it. None leaves the row out of the mean. The file is code that the tasks
name and that runs as the user. The path is relative to where `graft` is called. In results the metric has the name of
the function.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import field_validator

from graftlm.config.python_function import check_name, failure, load_function
from graftlm.config.schema import Flag, config
from graftlm.errors import DataError
from graftlm.evaluation.metrics.base import (
    UNBOUNDED,
    Answer,
    Array,
    Choice,
    Likelihood,
    MetricConfig,
    MetricRow,
    Outcome,
)


@config
class PythonMetricConfig(MetricConfig):
    name: Literal["python"] = "python"
    function: str
    """FILE.py:NAME, a function of one item that returns its score: a number, or None where it has none."""
    higher_is_better: Flag = True

    @field_validator("function")
    @classmethod
    def _file_and_name(cls, function: str) -> str:
        check_name(function, "metrics.py:score")
        return function


def parts(config: PythonMetricConfig, items: Sequence[Outcome]) -> Array:
    """Raises RecipeError for a file or function that is not there, DataError where it fails on an item."""
    function = load_function(config.function, "metrics")
    found = []
    for item in items:
        try:
            score = function(item)
            found.append((0.0, 0.0) if score is None else (float(score), 1.0))
        except Exception as error:
            raise DataError(
                f"{config.function} failed on {item.where}: {failure(error, config.function)}. It must return a "
                "number, or None",
                code="metric-function-failed",
            ) from error
        if not math.isfinite(found[-1][0]):
            raise DataError(
                f"{config.function} returned {found[-1][0]} for {item.where}: a score is a finite number, or None",
                code="metric-function-failed",
            )
    return np.asarray(found)


ROWS = {"python": MetricRow(PythonMetricConfig, (Answer, Choice, Likelihood), parts, low=-UNBOUNDED, high=UNBOUNDED)}
