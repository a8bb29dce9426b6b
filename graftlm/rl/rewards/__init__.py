"""SCORERS: the table of every way of judging answers. A new one is its file, its line here, and its test."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graftlm.rl.rewards import exact, judge, pattern, python, reward_model, rouge
from graftlm.rl.rewards.base import Completion, Reward, Scorer, ScorerConfig

__all__ = ["SCORERS", "Completion", "Reward", "Scorer", "ScorerConfig", "make_scorer"]


@dataclass(frozen=True)
class Row:
    """A row of the table: the config that names the scorer, and what makes it."""

    config: type[ScorerConfig]
    make: Callable[[Any, bool, datetime.date], Scorer]
    """(config, whether the network may be used, the day for chat templates that write the date); raises a GraftError
    where it could not work."""


SCORERS: dict[str, Row] = {
    "exact": Row(exact.ExactConfig, exact.make),
    "judge": Row(judge.JudgeScorerConfig, judge.make),
    "pattern": Row(pattern.PatternConfig, pattern.make),
    "python": Row(python.PythonConfig, python.make),
    "reward-model": Row(reward_model.RewardModelConfig, reward_model.make),
    "rouge-l": Row(rouge.RougeConfig, rouge.make),
}


def make_scorer(config: ScorerConfig, *, network: bool, today: datetime.date | None = None) -> Scorer:
    """`today` is the day of the run; None is the present day."""
    return SCORERS[config.by].make(config, network, today or datetime.date.today())
