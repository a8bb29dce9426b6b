"""SCORERS: the table of every way of judging answers. A new one is its file, its line here, and its test."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graftlm.rl.rewards import exact, judge, pattern, python, reward_model, rouge
from graftlm.rl.rewards.base import Completion, Reward, Scorer, ScorerConfig

__all__ = ["SCORERS", "Completion", "Reward", "Scorer", "ScorerConfig", "make_scorer"]


@dataclass(frozen=True)
class RewardRow:
    """A row of the table: the config that names the scorer, and what makes it."""

    config: type[ScorerConfig]
    make: Callable[[Any, bool, datetime.date], Scorer]
    """(config, whether the network may be used, the day for chat templates that write the date); raises a GraftError
    where it could not work."""


SCORERS: dict[str, RewardRow] = {
    "exact": RewardRow(exact.ExactConfig, exact.make),
    "judge": RewardRow(judge.JudgeScorerConfig, judge.make),
    "pattern": RewardRow(pattern.PatternConfig, pattern.make),
    "python": RewardRow(python.PythonConfig, python.make),
    "reward-model": RewardRow(reward_model.RewardModelConfig, reward_model.make),
    "rouge-l": RewardRow(rouge.RougeConfig, rouge.make),
}


def make_scorer(config: ScorerConfig, *, network: bool, today: datetime.date | None = None) -> Scorer:
    """`today` is the day of the run; None is the present day."""
    return SCORERS[config.by].make(config, network, today or datetime.date.today())
