"""What an evaluation found: each metric with its interval, and each adapter against the base.

    intervals     Wilson's for a rate without groups; else a bootstrap of groups (or of rows where each is its own)
    differences   the same bootstrap of adapter minus base on the same rows
    p             McNemar's exact test for a rate without groups; else the paired randomization test, which is the
                  sign-flip test for a mean
    p_holm        the p values of the first metric of every task and adapter together, by Holm
    detectable    the smallest difference that as many rows find with probability 0.8; say it with every "none found"

Where a task has several templates, the value is the mean of those of each, and an interval is about the rows: templates
are taken as they are. `templates` has the value of each, the worst, and the standard deviation (`spread`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import NormalDist
from typing import Any

import numpy as np

from graftlm import __version__
from graftlm.errors import DataError
from graftlm.evaluation.asking import outcome
from graftlm.evaluation.journal import Entry
from graftlm.evaluation.metrics import METRICS, Array, MetricConfig, MetricRow, higher_is_better, shown_name
from graftlm.evaluation.statistics.detectable import detectable_mean_difference, detectable_rate_difference
from graftlm.evaluation.statistics.intervals import Interval, difference_interval, mean_interval, wilson_interval
from graftlm.evaluation.statistics.resampling import (
    randomization_test,
    statistic_difference,
    statistic_interval,
)
from graftlm.evaluation.statistics.samples import normal_quantile
from graftlm.evaluation.statistics.significance import holm, mcnemar
from graftlm.evaluation.task import Task

ALPHA, POWER = 0.05, 0.8
Tree = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A metric of a task, for one model."""

    config: MetricConfig
    row: MetricRow
    parts: Array
    """[n, templates, k]"""
    groups: Sequence[Any] | None
    """The group of each row; None where each row is its own."""

    def statistic(self, sums: Array) -> Array:
        """The mean over templates of the metric, by flat sums [..., templates k]."""
        found: Array = self.row.value(sums.reshape(*sums.shape[:-1], *self.parts.shape[1:])).mean(-1)
        return found

    @property
    def flat(self) -> Array:
        return self.parts.reshape(len(self.parts), -1)

    @property
    def by_template(self) -> list[float]:
        return [float(each) for each in self.row.value(self.parts.sum(0))]

    @property
    def value(self) -> float:
        return float(self.statistic(self.flat.sum(0)))

    @cached_property
    def scores(self) -> Array | None:
        """The score of each row [n], where the metric is the mean of these and every row has one."""
        if not self.row.per_item or not (self.parts[..., 1] == 1).all():
            return None
        found: Array = self.parts[..., 0].mean(1)
        return found

    @property
    def is_rate(self) -> bool:
        """Whether it is a rate of independent rows."""
        return self.groups is None and self.scores is not None and bool(np.isin(self.scores, (0, 1)).all())

    def interval(self) -> Interval:
        if self.is_rate:
            assert self.scores is not None
            return wilson_interval(self.scores)
        try:
            if self.scores is not None:
                return mean_interval(self.scores, self.groups)
            return statistic_interval(self.flat, self.statistic, self.groups)
        except DataError:  # of one row or one group
            return Interval(self.value, math.nan, math.nan, len(self.parts))


@dataclass(frozen=True)
class Comparison:
    """An adapter against the base in a metric of a task."""

    task: str
    metric: str
    adapter: str
    base: str
    difference: Interval
    """Adapter minus base."""
    p: float
    test: str
    detectable: float
    higher_is_better: bool
    p_holm: float | None = None
    """Of the first metric of each task."""

    @property
    def verdict(self) -> str:
        p = self.p if self.p_holm is None else self.p_holm
        if not p <= ALPHA:
            return "no difference found"
        return "better" if (self.difference.value > 0) == self.higher_is_better else "worse"

    def to_json(self) -> Tree:
        low, high = self.difference.low, self.difference.high
        return {
            "task": self.task,
            "metric": self.metric,
            "adapter": self.adapter,
            "base": self.base,
            "difference": _numbers(value=self.difference.value, low=low, high=high, n=self.difference.n),
            **_numbers(p=self.p, p_holm=self.p_holm, detectable=self.detectable),
            "test": self.test,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Evaluation:
    """What every model said to every item, and what comes of it."""

    tasks: Sequence[Task]
    models: Sequence[str]
    entries: Mapping[tuple[str, int], Entry]
    base: str | None
    """The model that the others are compared with."""
    tie: float
    """Nats within which rounding may decide."""

    @cached_property
    def measured(self) -> dict[tuple[str, str, str], Measured]:
        """(task, model, metric) -> what was measured, in the order of tasks, models and metrics."""
        return {
            (task.name, model, shown_name(metric)): self._measure(task, model, metric)
            for task in self.tasks
            for model in self.models
            for metric in task.metrics
        }

    def _measure(self, task: Task, model: str, metric: MetricConfig) -> Measured:
        row = METRICS[metric.name]
        parts = [
            row.parts(
                metric,
                [
                    outcome(task, item, template, dict(self.entries[task.name, number][model][template]))
                    for number, item in enumerate(task.items)
                ],
            )
            for template in range(task.templates)
        ]
        groups = [item.group if item.group is not None else ("row", n) for n, item in enumerate(task.items)]
        alone = len(set(groups)) == len(groups)
        return Measured(metric, row, np.stack(parts, axis=1), None if alone else groups)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        found, first = list[Comparison](), list[int]()
        for task in self.tasks if self.base is not None else ():
            for model in self.models:
                for metric in task.metrics if model != self.base else ():
                    first += [len(found)] if metric is task.metrics[0] else []
                    found.append(self._compare(task.name, model, metric))
        adjusted = holm([found[number].p for number in first])
        for number, p in zip(first, adjusted, strict=True):
            found[number] = Comparison(**{**found[number].__dict__, "p_holm": p})
        return found

    def _compare(self, task: str, model: str, metric: MetricConfig) -> Comparison:
        assert self.base is not None
        name = shown_name(metric)
        own, base = (self.measured[task, each, name] for each in (model, self.base))
        make = partial(Comparison, task, name, model, self.base, higher_is_better=higher_is_better(metric))
        return make(*compare(own, base))

    def to_json(self) -> Tree:
        """Plain numbers: what is not defined is None."""
        tasks: Tree = {}
        for (task, model, metric), each in self.measured.items():
            tasks.setdefault(task, {}).setdefault(model, {})[metric] = _shown(each)
        return {
            "graftlm": __version__,
            "models": list(self.models),
            "base": self.base,
            "tasks": tasks,
            "comparisons": [each.to_json() for each in self.comparisons],
            "metrics": self._metrics(),
            "tie": self.tie,
            "answers": {task.name: {model: self._answers(task, model) for model in self.models} for task in self.tasks},
        }

    def _metrics(self) -> Tree:
        """What each metric is: its range, which end is better, and whether it is a mean over rows."""
        found: Tree = {}
        for task in self.tasks:
            for metric in task.metrics:
                row = METRICS[metric.name]
                found[shown_name(metric)] = {
                    **_numbers(low=row.low, high=row.high),
                    "higher_is_better": higher_is_better(metric),
                    "per_item": row.per_item,
                }
        return found

    def _answers(self, task: Task, model: str) -> Tree:
        """How many rows there are, how many answers were cut off, and which rows rounding may decide."""
        found = [self.entries[task.name, number][model] for number in range(len(task.items))]
        near = [
            item.where for item, each in zip(task.items, found, strict=True) if any(one["near_tie"] for one in each)
        ]
        cut = sum(bool(one.get("cut")) for each in found for one in each)
        return {"n": len(found), "templates": task.templates, "cut": cut, "near_ties": near}


def compare(own: Measured, base: Measured) -> tuple[Interval, float, str, float]:
    """(difference, p, name of the test, detectable difference) of a metric of two models on the same rows."""
    groups = own.groups
    rate = own.is_rate and base.is_rate
    try:
        if own.scores is not None and base.scores is not None:
            difference = difference_interval(own.scores, base.scores, groups)
            detectable = detectable_mean_difference(own.scores, base.scores, groups, alpha=ALPHA, power=POWER)
            if rate:
                detectable = detectable_rate_difference(own.scores, base.scores, alpha=ALPHA, power=POWER)
        else:
            found = statistic_difference(own.flat, base.flat, own.statistic, groups)
            difference = found.interval
            detectable = (normal_quantile(1 - ALPHA) + NormalDist().inv_cdf(POWER)) * found.error
        if rate:
            assert own.scores is not None
            assert base.scores is not None
            return difference, mcnemar(own.scores, base.scores).p, "McNemar", detectable
        p = randomization_test(own.flat, base.flat, own.statistic, groups)
        return difference, p, "paired randomization", detectable
    except DataError:  # of one row or one group
        difference = Interval(own.value - base.value, math.nan, math.nan, len(own.parts))
        return difference, 1.0, "none: one row or one group", math.inf


def _shown(each: Measured) -> Tree:
    interval = each.interval()
    shown: Tree = _numbers(value=interval.value, low=interval.low, high=interval.high, n=interval.n)
    if len(values := each.by_template) > 1:
        worst = min(values) if higher_is_better(each.config) else max(values)
        spread = float(np.std(values))
        shown["templates"] = {"values": [_number(value) for value in values], **_numbers(worst=worst, spread=spread)}
    return shown


def _numbers(**values: Any) -> Tree:
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> Any:
    return value if value is None or math.isfinite(value) else None
