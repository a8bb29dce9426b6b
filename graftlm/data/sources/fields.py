"""Mappings that record which of their keys were read, so that the report can name the keys that nobody reads."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

LEVELS = ("rows", "messages", "parts and calls of messages")
"""Names of the levels of nesting, from the keys of the row inward; deeper keys count as the last level."""

NESTED = (dict, list)
"""What may hold keys of its own."""

Unread = tuple[tuple[str, str], ...]
"""(level, key) of each key of one row that no reader has used."""


class Tracked(dict[str, Any]):
    """A copy of a mapping that records the keys that are read with `[]` and `get`.

    Mappings in a value, or in lists in it, are tracked from the moment when the value is read. `in`, iteration and
    comparison read nothing.
    """

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        super().__init__(mapping)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if key not in self.read:
            self.read.add(key)
            if type(value) in NESTED:
                value = tracked(value)
                super().__setitem__(key, value)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (it is this `get`)


def tracked(value: Any) -> Any:
    if isinstance(value, list):
        return [tracked(one) for one in value]
    return Tracked(value) if isinstance(value, dict) and not isinstance(value, Tracked) else value


def read_all(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy of a mapping; all its keys count as used."""
    if isinstance(mapping, Tracked):
        mapping.read.update(mapping)
    return dict(mapping)


def unread(*rows: Any) -> Unread:
    """The keys that were not read, in the order of the row, without those that hold no value (null, empty). A mapping
    that was not read counts as one key."""
    seen: set[int] = set()
    return tuple(found for row in rows for found in _unread(row, 0, seen))


def _unread(value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for one in value:
            yield from _unread(one, depth, seen)
    elif isinstance(value, Tracked) and id(value) not in seen:
        seen.add(id(value))
        for key, inner in value.items():
            if key in value.read:
                if isinstance(inner, NESTED):
                    yield from _unread(inner, depth + 1, seen)
            elif inner not in (None, "", [], {}):
                yield LEVELS[min(depth, len(LEVELS) - 1)], str(key)


def unread_notes(unread: Iterable[tuple[str, Unread]], known: Iterable[str]) -> list[str]:
    """A line for each level with all its unread keys: how often each occurs, and in which row first. `unread` has
    (place of the row, its unread keys); `known` are the keys that an unread one may be a misspelling of."""
    counts: dict[str, Counter[str]] = {level: Counter() for level in LEVELS}
    first: dict[tuple[str, str], str] = {}
    for where, keys in unread:
        for level, key in keys:
            counts[level][key] += 1
            first.setdefault((level, key), where)
    options, lines = list(known), []
    for level, found in counts.items():
        unused_keys = []
        for key, count in found.items():
            near = get_close_matches(key, options, n=1, cutoff=0.8)
            hint = f"; did you mean {near[0]!r}?" if near and near[0] != key else ""
            unused_keys.append(f"{key!r} ({count:,}, first in {first[level, key]}{hint})")
        if unused_keys:
            lines.append(f"fields of {level} that are not used: {', '.join(unused_keys)}")
    return lines
