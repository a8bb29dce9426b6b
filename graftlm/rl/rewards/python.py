"""A function of the user's: `rewards.py:score`.

    def score(completion) -> float | None:      # rewards.py
        return -abs(len(completion.answer.split()) - 10)

`completion` is a `graftlm.rl.rewards.base.Completion`: `answer`, `question`, `messages`, `reference`, `cut`, `where`.
The file is code that the recipe names and that runs as the user. The path is relative to where `graft` is called, as
all paths in a recipe are.
"""

import datetime
import importlib.util
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from graftlm.config.schema import config
from graftlm.errors import RecipeError, TrainingError, nearest
from graftlm.rl.rewards.base import Completion, Reward, Scorer, ScorerConfig


@config
class PythonConfig(ScorerConfig):
    by: Literal["python"] = "python"
    function: str
    """FILE.py:NAME, a function of one answer that returns its reward: a number, or None where it cannot say."""

    @field_validator("function")
    @classmethod
    def _file_and_name(cls, function: str) -> str:
        file, colon, name = function.rpartition(":")
        if not (colon and file.endswith(".py") and name.isidentifier()):
            raise ValueError("write FILE.py:NAME, for example rewards.py:score")
        return function


def make(config: PythonConfig, network: bool, today: datetime.date) -> Scorer:
    """Raises RecipeError for a file or a function that is not there, or that does not run."""
    path, _, name = config.function.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        there = [str(other) for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise RecipeError(f"rl.scorer.function: {file}: no such file. {nearest(str(file), there)}", code="no-such-file")
    spec = importlib.util.spec_from_file_location(f"graftlm_scorer_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(
            f"rl.scorer.function: {file} does not run: {_describe(error, file)}", code="broken-reward-file"
        ) from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RecipeError(
            f"rl.scorer.function: {file} has no function {name!r}. {nearest(name, names)}", code="no-such-function"
        )

    def score(answers: Sequence[Completion]) -> list[Reward]:
        return [_one(completion) for completion in answers]

    def _one(completion: Completion) -> Reward:
        try:
            found = function(completion)
            return None if found is None else float(found)
        except Exception as error:
            raise TrainingError(
                f"{config.function} failed on an answer to {completion.where}: {_describe(error, file)}\nThe answer: "
                f"{completion.answer[:200]!r}. It must return a number, or None",
                code="reward-function-failed",
            ) from error

    return score


def _describe(error: Exception, file: Path) -> str:
    """The error and its line in the user's file, as text."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    at = f"line {lines[-1]}: " if lines else ""
    return f"{at}{type(error).__name__}: {error}"
