"""Every error that a user can put right, as one small tree.

A message says what was wrong, where it is, what is near it, and what to do. Mistakes of ours are `assert`s.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class GraftError(Exception):
    """The root: catch this to catch everything that graftlm refuses."""


class RecipeError(GraftError):
    """A recipe or a `key=value` with an unknown key, a wrong type or a value out of range."""


class DataError(GraftError):
    """Rows that cannot be read, understood or trained on. Lists every one as `file:line: reason`."""


class BaseModelError(GraftError):
    """A base that cannot be found, is incomplete, is unsafe to load, or is not the one an adapter was trained on."""


class TargetError(GraftError):
    """Targets or patterns that match no layer, or a layer that a delta cannot sit on."""


class AdapterError(GraftError):
    """An adapter on disk that is damaged, incomplete, or does not fit."""


class OutputError(GraftError):
    """A place that results cannot be written to: it exists, is read-only, or has no room."""


class TrainingError(GraftError):
    """A run that must not go on: a non-finite loss, a tensor that learns nothing, attention that leaks."""


class PlatformError(GraftError):
    """An operating system that graftlm does not run on."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence that names what `word` was probably meant to be, or what there is. Ends without a space."""
    options = sorted(set(known))
    close = get_close_matches(word, options, n=count, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    shown = ", ".join(options[:12]) + (f", and {len(options) - 12} more" if len(options) > 12 else "")
    return f"There is: {shown}." if options else "There is nothing to choose from."


def numbered(problems: list[str], limit: int = 20) -> str:
    """Many problems as one message: the first `limit` of them, a line each, and how many are left."""
    left = len(problems) - limit
    return "\n".join(f"  {p}" for p in problems[:limit]) + (f"\n  and {left} more" if left > 0 else "")
