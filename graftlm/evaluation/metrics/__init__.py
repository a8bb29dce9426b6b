"""METRICS: the table of every metric by its name. A new one is its file, its line here, and its test."""

from collections.abc import Mapping
from typing import Any

from graftlm.config.schema import build
from graftlm.errors import RecipeError, nearest
from graftlm.evaluation.metrics import (
    choice,
    cider,
    correlation,
    exact,
    f1,
    gestalt,
    ifeval,
    json_answers,
    likelihood,
    meteor,
    nist,
    python,
    rouge,
    task_score,
    tool_calls,
    translation,
)
from graftlm.evaluation.metrics.base import Answer, Array, Choice, Likelihood, MetricConfig, MetricRow, Outcome

__all__ = ["METRICS", "Answer", "Array", "Choice", "Likelihood", "MetricConfig", "MetricRow", "Outcome", "metric_of"]

METRICS: dict[str, MetricRow] = {
    **exact.ROWS,
    **f1.ROWS,
    **rouge.ROWS,
    **translation.ROWS,
    **nist.ROWS,
    **meteor.ROWS,
    **cider.ROWS,
    **gestalt.ROWS,
    **json_answers.ROWS,
    **tool_calls.ROWS,
    **ifeval.ROWS,
    **task_score.ROWS,
    **correlation.ROWS,
    **choice.ROWS,
    **likelihood.ROWS,
    **python.ROWS,
}


def metric_of(entry: str | Mapping[str, Any], source: str) -> MetricConfig:
    """The config of a metric as tasks write it: a name, {name: NAME, ...} or {python: FILE.py:NAME}.

    Raises RecipeError, which begins with `source`.
    """
    tree = {"name": entry} if isinstance(entry, str) else dict(entry)
    if isinstance(tree.get("python"), str):
        tree = {"name": "python", "function": tree.pop("python"), **tree}
    name = tree.get("name")
    if name not in METRICS:
        raise RecipeError(f"{source}: no metric {name!r}. {nearest(str(name), METRICS)}", code="no-such-metric")
    return build(METRICS[name].config, tree, source=source)


def shown_name(config: MetricConfig) -> str:
    """What a metric is called in results: its label, else its name, or that of the user's function."""
    if config.label is not None:
        return config.label
    return config.function.rpartition(":")[2] if isinstance(config, python.PythonMetricConfig) else config.name


def higher_is_better(config: MetricConfig) -> bool:
    if isinstance(config, python.PythonMetricConfig):
        return config.higher_is_better
    return METRICS[config.name].higher_is_better
