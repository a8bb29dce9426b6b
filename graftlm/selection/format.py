"""Rows whose answers have a certain form: a filter by regular expressions. Every row that passes has the same score.

    left out unless   `matches` is found in every answer   and   `lacks` in none

Both are Python's, searched for anywhere in the answer: begin with (?s)^ and end with $ to mean all of it.
"""

import re
from typing import Literal

import numpy as np

from graftlm.config.schema import Pattern, config
from graftlm.data.sources.formats import TEXT
from graftlm.selection.base import LEFT_OUT, Pool, Scores, SelectorConfig


@config
class FormatConfig(SelectorConfig):
    by: Literal["format"] = "format"
    matches: Pattern | None = None
    """A regular expression that has to be found in every answer of a row."""
    lacks: Pattern | None = None
    """A regular expression that must be found in none: "As an AI" finds boilerplate, for example."""


def score(config: FormatConfig, pool: Pool) -> Scores:
    passes = pool.usable
    for number, row in enumerate(pool.rows):
        answers = [m.content for m in row.messages if m.role in ("assistant", TEXT)]
        has = all(re.search(config.matches or "", answer) for answer in answers)
        has_not = config.lacks is None or not any(re.search(config.lacks, answer) for answer in answers)
        passes[number] &= has and has_not
    return np.where(passes, 0, LEFT_OUT).astype(np.float32)
