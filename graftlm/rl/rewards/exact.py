"""Exact match: 1 where the answer is the row's own, else 0; or where what is taken out of both is the same.

`take: "#### (.*)"` compares the results of GSM8K's rows (Cobbe et al. 2021, arXiv:2110.14168) and not the way there.
"""

import datetime
import re
from collections.abc import Sequence
from typing import Literal
from unicodedata import normalize

from graftlm.config.schema import Flag, Pattern, config
from graftlm.errors import DataError
from graftlm.rl.rewards.base import Completion, Reward, Scorer, ScorerConfig


@config
class ExactConfig(ScorerConfig):
    by: Literal["exact"] = "exact"
    take: Pattern | None = None
    """A regular expression: the first group (or all) of its last match is compared, in place of the whole text. An
    answer without a match has 0."""
    ignore_case: Flag = False
    """Compare without regard to case, in every script that has it."""


def make(config: ExactConfig, network: bool, today: datetime.date) -> Scorer:
    def score(answers: Sequence[Completion]) -> list[Reward]:
        found: list[Reward] = []
        for completion in answers:
            reference = extract(config, completion.required_reference("exact"))
            if reference is None:
                raise DataError(
                    f"{completion.where}: scorer 'exact': {config.take!r} matches nothing in the row's own answer",
                    code="nothing-to-compare",
                )
            found.append(float(extract(config, completion.answer) == reference))
        return found

    return score


def extract(config: ExactConfig, text: str) -> str | None:
    """What is compared of a text; None where `take` has no match."""
    if config.take is not None:
        matches = list(re.finditer(config.take, text))
        if not matches:
            return None
        text = matches[-1][1 if matches[-1].re.groups else 0] or ""
    text = normalize("NFC", text.strip())
    return text.casefold() if config.ignore_case else text
