"""A judge: the grade that the model behind an OpenAI-compatible endpoint writes for an answer.

A reply without a grade is None, so its answer is left out; where more than half of a step's replies are, it is an
error.
"""

import datetime
from collections.abc import Sequence
from typing import Literal

from graftlm.config.schema import config
from graftlm.judges.endpoint import GRADE, EndpointConfig, ask, check, filled, grades
from graftlm.rl.rewards.base import Completion, Reward, Scorer, ScorerConfig


@config
class JudgeScorerConfig(EndpointConfig, ScorerConfig):
    by: Literal["judge"] = "judge"
    url: str
    """An OpenAI-compatible endpoint, up to /v1. One that is not on this machine needs `network: true`."""
    prompt: str = GRADE
    """What the judge is asked; {question}, {answer} and {reference} (the row's own answer) are replaced."""


def make(config: JudgeScorerConfig, network: bool, today: datetime.date) -> Scorer:
    key = check(config, network=network)

    def score(answers: Sequence[Completion]) -> list[Reward]:
        replies = list(ask(config, key, [_question(config, completion) for completion in answers]))
        return grades(replies)

    return score


def _question(config: JudgeScorerConfig, completion: Completion) -> str:
    texts = {"question": "\n\n".join(message.content for message in completion.messages), "answer": completion.answer}
    if "{reference}" in config.prompt:
        texts["reference"] = completion.required_reference("judge")
    return filled(config.prompt, texts)
