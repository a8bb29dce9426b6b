"""A function of the user's, named as FILE.py:NAME: the file is code that a recipe names and that runs as the user."""

import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftlm.errors import RecipeError, nearest


def check_name(function: str, example: str) -> None:
    """ValueError for what is not FILE.py:NAME."""
    file, colon, name = function.rpartition(":")
    if not (colon and file.endswith(".py") and name.isidentifier()):
        raise ValueError(f"write FILE.py:NAME, for example {example}")


def load_function(function: str, key: str) -> Callable[..., Any]:
    """The function that FILE.py:NAME names. Raises RecipeError, which begins with `key`, for a file or a function that
    is not there, or a file that does not run."""
    path, _, name = function.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        there = [str(other) for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise RecipeError(f"{key}: {file}: no such file. {nearest(str(file), there)}", code="no-such-file")
    spec = importlib.util.spec_from_file_location(f"graftlm_user_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(
            f"{key}: {file} does not run: {failure(error, function)}", code="broken-reward-file"
        ) from error
    found: Any = getattr(module, name, None)
    if not callable(found):
        known = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise RecipeError(f"{key}: {file} has no function {name!r}. {nearest(name, known)}", code="no-such-function")
    made: Callable[..., Any] = found
    return made


def failure(error: Exception, function: str) -> str:
    """What went wrong, and in which line of the user's file."""
    file = Path(function.rpartition(":")[0]).expanduser()
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    at = f"line {lines[-1]}: " if lines else ""
    return f"{at}{type(error).__name__}: {error}"
