"""What every metric is: a config, and from it numbers of each item, whose sums over items make the value.

    parts(config, items) -> [n, k];    value(sums [..., k]) -> [...]

n items, k numbers of each. A mean has k = 2: the item's score, and 1 (0 and 0 for an item that has no score). Every
metric of a corpus is a function of sums too, BLEU of its counts say, so an interval is made of sums over drawn items,
and a test of two models of sums over items whose answers were exchanged. Neither computes an item again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.config.schema import config
from graftlm.errors import DataError

Array = NDArray[Any]


@dataclass(frozen=True)
class Answer:
    """A text that a model wrote."""

    text: str
    references: tuple[str, ...] = ()
    """What would be right: any of them."""
    prompt: str = ""
    """What was asked: the last message."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row's own: `schema`, `calls`, `instructions` and so on, which some metrics read."""
    where: str = ""
    """The row that asks: `FILE:LINE`."""


@dataclass(frozen=True)
class Choice:
    """How likely a model finds each of several continuations."""

    log_probs: tuple[float, ...]
    """ln p(choice | prompt), one for each choice, in nats."""
    texts: tuple[str, ...]
    """The choices, without what stands between prompt and choice."""
    gold: tuple[int, ...]
    """Numbers of the right choices, from 0; one at least."""
    unconditional: tuple[float, ...] | None = None
    """ln p(choice) after nothing but the token that begins a text."""
    where: str = ""

    @property
    def best(self) -> int:
        """The likeliest choice; the first of several that are as likely."""
        return int(np.argmax(self.log_probs))

    @property
    def probabilities(self) -> Array:
        """softmax(ln p), over the choices alone."""
        logits = np.asarray(self.log_probs) - max(self.log_probs)
        found: Array = np.exp(logits) / np.exp(logits).sum()
        return found


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a text."""

    log_prob: float
    """The sum of ln p over its tokens, in nats."""
    tokens: int
    text: str
    greedy: bool = False
    """Whether each of its tokens was the likeliest one."""
    where: str = ""


Outcome = Answer | Choice | Likelihood


@config
class MetricConfig:
    """The base of all configs of metrics; each adds `name`, its key in METRICS, and its options."""

    name: str
    label: str | None = None
    """What it is called in results, where a task has the same metric twice."""


def mean(sums: Array) -> Array:
    """Sum of the scores [..., 0] over their number [..., 1]."""
    return ratio(sums[..., 0], sums[..., 1])


@dataclass(frozen=True)
class MetricRow:
    """A row of the table METRICS."""

    config: type[MetricConfig]
    outcomes: tuple[type[Any], ...]
    """What it is a metric of: Answer, Choice or Likelihood."""
    parts: Callable[[Any, Sequence[Any]], Array]
    """(config, n items) -> [n, k]. Raises DataError for an item that lacks what the metric compares with."""
    value: Callable[[Array], Array] = mean
    """Sums [..., k] -> the metric [...]; NaN where it is not defined."""
    low: float = 0.0
    """The worst or the smallest that the metric can be; `high` likewise."""
    high: float = 1.0
    higher_is_better: bool = True
    unconditional: bool = False
    """Whether it needs `Choice.unconditional`."""

    @property
    def per_item(self) -> bool:
        """Whether it is the mean of a score that every item has by itself."""
        return self.value is mean

    @property
    def best(self) -> float:
        return self.high if self.higher_is_better else self.low


UNBOUNDED = inf


def scores(values: Sequence[float]) -> Array:
    """Scores of n items as parts [n, 2]."""
    return np.stack([np.asarray(values, dtype=float), np.ones(len(values))], axis=1)


def ratio(above: Array, below: Array) -> Array:
    """above / below; NaN where below is 0."""
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    found: Array = np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below != 0)
    return found


def references(item: Answer, metric: str) -> tuple[str, ...]:
    """What the item's answer is compared with; DataError where there is nothing."""
    if not item.references:
        raise DataError(
            f"{item.where}: metric {metric!r} compares with the row's own answer, and it has none. Give the task an "
            "`answer`, or another metric",
            code="no-reference-answer",
        )
    return item.references


def field_of(item: Answer, name: str, metric: str) -> Any:
    """A field of the row that a metric reads; DataError where there is none."""
    if item.fields.get(name) is None:
        raise DataError(
            f"{item.where}: metric {metric!r} reads the field {name!r} of the row, and it has none. It has: "
            f"{', '.join(sorted(item.fields)) or 'no fields'}",
            code="no-such-field",
        )
    return item.fields[name]
