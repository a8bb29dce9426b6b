"""A function of the user's: `rewards.py:score`.

    def score(completion) -> float | None:      # rewards.py
        return -abs(len(completion.answer.split()) - 10)

`completion` is a `graftlm.rl.rewards.base.Completion`: `answer`, `question`, `messages`, `reference`, `cut`, `where`.
The file is code that the recipe names and that runs as the user. The path is relative to where `graft` is called, as
all paths in a recipe are.
"""

import datetime
from collections.abc import Sequence
from typing import Literal

from pydantic import field_validator

from graftlm.config.python_function import check_name, failure, load_function
from graftlm.config.schema import config
from graftlm.errors import TrainingError
from graftlm.rl.rewards.base import Completion, Reward, Scorer, ScorerConfig


@config
class PythonConfig(ScorerConfig):
    by: Literal["python"] = "python"
    function: str
    """FILE.py:NAME, a function of one answer that returns its reward: a number, or None where it cannot say."""

    @field_validator("function")
    @classmethod
    def _file_and_name(cls, function: str) -> str:
        check_name(function, "rewards.py:score")
        return function


def make(config: PythonConfig, network: bool, today: datetime.date) -> Scorer:
    """Raises RecipeError for a file or a function that is not there, or that does not run."""
    function = load_function(config.function, "rl.scorer.function")

    def score(answers: Sequence[Completion]) -> list[Reward]:
        return [_one(completion) for completion in answers]

    def _one(completion: Completion) -> Reward:
        try:
            found = function(completion)
            return None if found is None else float(found)
        except Exception as error:
            raise TrainingError(
                f"{config.function} failed on an answer to {completion.where}: {failure(error, config.function)}\n"
                f"The answer: {completion.answer[:200]!r}. It must return a number, or None",
                code="reward-function-failed",
            ) from error

    return score
