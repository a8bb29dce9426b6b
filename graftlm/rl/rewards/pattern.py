r"""A form: 1 where a regular expression matches, else 0. `^[^.\n]+\.$` asks for one line that is one sentence."""

import datetime
import re
from collections.abc import Sequence
from typing import Literal

from graftlm.config.schema import Pattern, config
from graftlm.rl.rewards.base import Completion, Reward, Scorer, ScorerConfig


@config
class PatternConfig(ScorerConfig):
    by: Literal["pattern"] = "pattern"
    pattern: Pattern
    """A regular expression that is searched for in the answer; ^ and $ are its beginning and its end."""


def make(config: PatternConfig, network: bool, today: datetime.date) -> Scorer:
    found = re.compile(config.pattern)

    def score(answers: Sequence[Completion]) -> list[Reward]:
        return [float(found.search(completion.answer) is not None) for completion in answers]

    return score
