"""Text that reads like a control token and is none: where strangers write messages, it keeps the ids of its letters.

A private character goes inside each such text before the template renders it. Where it stands afterwards, no token may
lie across, so the control token cannot be there; the character itself is taken out.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from graftlm.data.sources.formats import Fields, Message


@lru_cache(maxsize=64)
def _pattern(texts: frozenset[str]) -> re.Pattern[str] | None:
    """Matches before the second character of each text, of overlapping ones too."""
    found = sorted(text for text in texts if len(text) > 1)
    return re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in found)) if found else None


def marked(text: str, mark: str, controls: Collection[str]) -> str:
    """The text with the mark inside each of these texts."""
    pattern = _pattern(frozenset(controls))
    return text if pattern is None else pattern.sub(mark, text)


def marked_fields(value: Any, mark: str, controls: Collection[str]) -> Any:
    """The same for every text in a tree of lists and mappings, keys included."""
    if isinstance(value, str):
        return marked(value, mark, controls)
    if isinstance(value, Mapping):
        return {marked_fields(key, mark, controls): marked_fields(one, mark, controls) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(marked_fields(one, mark, controls) for one in value)
    return value


def with_marks(message: Message, mark: str, controls: Collection[str]) -> Message:
    """The same for all that a message says."""
    calls: tuple[Fields, ...] = marked_fields(message.tool_calls, mark, controls)
    content, thinking, call_id, name = (
        marked(text, mark, controls) for text in (message.content, message.thinking, message.call_id, message.name)
    )
    return replace(message, content=content, thinking=thinking, call_id=call_id, name=name, tool_calls=calls)


def without_mark(text: str, mark: str) -> tuple[str, list[int]]:
    """The text without the marks, and where they stood in it."""
    if not mark or mark not in text:
        return text, []
    parts = text.split(mark)
    places, end = [], 0
    for part in parts[:-1]:
        end += len(part)
        places.append(end)
    return "".join(parts), places
