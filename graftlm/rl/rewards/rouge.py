"""ROUGE-L F1 against the row's own answer: from 0 to 1."""

import datetime
from collections.abc import Sequence
from typing import Literal

from graftlm.config.schema import config
from graftlm.evaluation.held_out import rouge_l
from graftlm.rl.rewards.base import Completion, Reward, Scorer, ScorerConfig


@config
class RougeConfig(ScorerConfig):
    by: Literal["rouge-l"] = "rouge-l"


def make(config: RougeConfig, network: bool, today: datetime.date) -> Scorer:
    def score(answers: Sequence[Completion]) -> list[Reward]:
        return [rouge_l(completion.required_reference("rouge-l"), completion.answer) for completion in answers]

    return score
