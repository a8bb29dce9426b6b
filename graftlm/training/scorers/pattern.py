r"""A form: 1 where a regular expression matches, else 0. `^[^.\n]+\.$` asks for one line that is one sentence."""

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import field_validator

from graftlm.config import config
from graftlm.training.scorers.base import Reward, Said, Scorer, ScorerConfig
from graftlm.training.scorers.exact import compiles


@config
class PatternConfig(ScorerConfig):
    by: Literal["pattern"] = "pattern"
    pattern: str
    """A regular expression that is searched for in the answer; ^ and $ are its beginning and its end."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str | None:
        return compiles(pattern)


def make(config: PatternConfig, network: bool) -> Scorer:
    found = re.compile(config.pattern)

    def score(answers: Sequence[Said]) -> list[Reward]:
        return [float(found.search(said.answer) is not None) for said in answers]

    return score
