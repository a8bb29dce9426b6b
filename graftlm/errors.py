"""Every error that a user can put right, as one small tree.

A message says what was wrong, where it is, what is near it, and what to do. Mistakes of ours are `assert`s.
"""

import re
from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, ClassVar


class GraftError(Exception):
    """The root: catch this to catch everything that graftlm refuses."""

    family: ClassVar[str] = "graft"
    """The first half of the codes of a class of errors."""

    def __init__(self, message: str, *, code: str) -> None:
        """`code`: two to four words joined by hyphens that name the condition, the same in every version."""
        super().__init__(message)
        self.slug = code

    @property
    def code(self) -> str:
        """`family/condition`, as in `data/unusable-rows`: what programs and tests compare."""
        return f"{self.family}/{self.slug}"

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which calls a class with its positional arguments alone."""
        return _restore, (type(self), self.args, self.slug)


def _restore(kind: type[GraftError], args: tuple[str], slug: str) -> GraftError:
    return kind(*args, code=slug)


class RecipeError(GraftError):
    """A recipe, a `key=value` or an option with an unknown key, a wrong type or a value out of range."""

    family = "recipe"


class DataError(GraftError):
    """Rows that cannot be read, understood or trained on. Lists every one as `file:line: reason`."""

    family = "data"


class BaseModelError(GraftError):
    """A base that cannot be found, is incomplete, is unsafe to load, or is not the one an adapter was trained on."""

    family = "base"


class TargetError(GraftError):
    """Targets or patterns that match no layer, or a layer that a delta cannot sit on."""

    family = "target"


class AdapterError(GraftError):
    """An adapter on disk that is damaged, incomplete, or does not fit."""

    family = "adapter"


class OutputError(GraftError):
    """A place that results cannot be written to: it exists, is read-only, or has no room."""

    family = "output"


class TrainingError(GraftError):
    """A run that must not go on: a non-finite loss, a tensor that learns nothing, attention that leaks."""

    family = "training"


class RequestError(GraftError):
    """A request that this model cannot answer as it is asked: a schema with unknown keywords, a token that is none."""

    family = "request"


class PlatformError(GraftError):
    """An operating system that graftlm does not run on."""

    family = "platform"


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence that names what `word` was probably meant to be, or what there is. Ends without a space."""
    options = sorted(set(known))
    close = get_close_matches(word, options, n=count, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    names = ", ".join(options[:12]) + (f", and {len(options) - 12} more" if len(options) > 12 else "")
    return f"There is: {names}." if options else "There is nothing to choose from."


def first_lines(error: Exception) -> str:
    """The first two lines of a library's error, as one."""
    return " ".join(str(error).strip().splitlines()[:2])


SHARED = 10
"""A reason that so many problems have is one line."""

_PLACE = re.compile(r"(?P<place>.*?(?::\d+)?(?:: (?:row|instance) \d+)?): (?P<reason>.*)", re.DOTALL)


def numbered(problems: list[str], limit: int = 20) -> str:
    """Many problems as one message: the first `limit` of them, a line each, and how many are left. Those with the same
    reason in different places (`FILE:3: reason`) are one line with their number."""
    places_and_reasons = [
        match.group("place", "reason") if (match := _PLACE.fullmatch(p)) else ("", p) for p in problems
    ]
    counts = Counter(reason for place, reason in places_and_reasons if place)
    shared = {reason for reason, count in counts.items() if count >= SHARED}
    lines: list[str] = []
    more, reasons = 0, set[str]()
    for problem, (place, reason) in zip(problems, places_and_reasons, strict=True):
        together = bool(place) and reason in shared
        if together and reason in reasons:
            continue
        count = counts[reason] if together else 1
        if together:
            reasons.add(reason)
        if len(lines) == limit:
            more += count
        else:
            lines.append(f"  {place} and {count - 1:,} more places: {reason}" if together else f"  {problem}")
    return "\n".join([*lines, *([f"  and {more:,} more"] if more else [])])
