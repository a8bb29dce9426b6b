"""What a chat template writes of calls, thoughts and tools: looked for in the text that it renders.

A name may stand in a template and never be written, or stand in the text because somebody mentions it. So the template
is run once more. This time each name of a function, each key and each text of its arguments, each thought and each tool
has a character of its own from the planes for private use. What the template writes has its character in the rendered
text, whatever else stands there.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graftlm.data.sources.messages import Fields, Message

PRIVATE = range(0xF0000, 0x10FFFE)
"""Unicode's two planes for private use; marks are those characters that no message contains."""

BEYOND = 700_000_000_000
"""Numbers from here on stand for numbers among arguments."""


@dataclass(frozen=True)
class LostPart:
    """What the template did not write, of messages by their index."""

    calls: Mapping[int, str] = field(default_factory=dict)
    """The first call that is missing or incomplete, in words: `the call of 'find'`."""
    unnamed: frozenset[int] = frozenset()
    """Messages of which the name of a called function is missing."""
    thoughts: frozenset[int] = frozenset()
    tools: bool = False
    """Whether any of the tools is missing."""


@dataclass(frozen=True)
class Probe:
    """A conversation with marks, and which mark stands for what."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    thoughts: dict[int, list[str]]
    """Marks around the thoughts of a message."""
    calls: dict[int, list["_Call"]]
    tool_marks: list[str]
    """A mark, or else the name, of each tool."""

    def lost(self, text: str) -> LostPart:
        """What is missing in the rendered text of this probe; of calls, what `_Call.missing` says."""
        calls = {i: next((m for c in some if (m := c.missing(text))), "") for i, some in self.calls.items()}
        return LostPart(
            {index: missing for index, missing in calls.items() if missing},
            frozenset(i for i, some in self.calls.items() if not all(all_in(call.name, text) for call in some)),
            frozenset(i for i, marks in self.thoughts.items() if not all_in(marks, text)),
            not all_in(self.tool_marks, text),
        )


@dataclass(frozen=True)
class _Call:
    function: str
    name: list[str]
    """The mark of the name; none where the name itself stands in the probe."""
    arguments: dict[str, list[str]]
    """What must be in the text for each argument."""
    traceable: bool
    """Whether every argument carries a mark, so that a lost one is noticed."""

    def missing(self, text: str) -> str:
        """The parts of the call that are missing in the text, in words; empty where all are there."""
        if not all_in(self.name, text) or not (self.name or self.traceable):
            return f"the call of {self.function!r}"
        keys = [key for key, marks in self.arguments.items() if not all_in(marks, text)]
        if keys and len(keys) == len(self.arguments):
            return f"the arguments of the call of {self.function!r}"
        return f"the argument {keys[0]!r} of the call of {self.function!r}" if keys else ""


def needs_probe(messages: Sequence[Message], tools: Sequence[Fields]) -> bool:
    """Whether there is anything that a template may leave out."""
    return bool(tools) or any(message.tool_calls or message.thinking for message in messages)


def probe(messages: Sequence[Message], tools: Sequence[Fields], marks: Iterator[str], *, names: bool) -> Probe:
    """The conversation with marks. Numbers among arguments are others that occur nowhere. Without `names` the names of
    functions, tools and arguments stay as they are, for templates that treat some of them by name."""
    numbers = iter(range(BEYOND, 2 * BEYOND))
    thoughts: dict[int, list[str]] = {}
    calls: dict[int, list[_Call]] = {}
    found: list[Message] = []
    for index, message in enumerate(messages):
        if message.thinking:
            before, after = thoughts[index] = [next(marks), next(marks)]
            message = replace(message, thinking=f"{before}{message.thinking}{after}")
        if message.tool_calls:
            probe_calls = [_call(call, marks, numbers, names) for call in message.tool_calls]
            calls[index] = [call for _, call in probe_calls]
            message = replace(message, tool_calls=tuple(fields for fields, _ in probe_calls))
        found.append(message)
    if not names:
        return Probe(
            found, [dict(tool) for tool in tools], thoughts, calls, [tool["function"]["name"] for tool in tools]
        )
    tool_marks = [next(marks) for _ in tools]
    renamed = [_renamed(tool, mark) for tool, mark in zip(tools, tool_marks, strict=True)]
    return Probe(found, renamed, thoughts, calls, tool_marks)


def _call(call: Fields, marks: Iterator[str], numbers: Iterator[int], names: bool) -> tuple[dict[str, Any], _Call]:
    name = [next(marks)] if names else []
    arguments, sought = {}, {}
    for key, value in call["function"]["arguments"].items():
        seek: list[str] = []
        marked_key = _marked_key(key, marks, seek) if names else key
        arguments[marked_key] = _marked(value, marks, numbers, seek, names)
        sought[key] = seek
    function = {**call["function"], "name": "".join([call["function"]["name"], *name]), "arguments": arguments}
    traceable = bool(sought) and all(sought.values())
    return {**call, "function": function}, _Call(str(call["function"]["name"]), name, sought, traceable)


def _marked(value: Any, marks: Iterator[str], numbers: Iterator[int], seek: list[str], names: bool) -> Any:
    """The value with a mark in each of its texts (and keys), which go into `seek`. What counts as false stays so."""
    if not value:
        return value
    if isinstance(value, str):
        seek.append(next(marks))
        return value + seek[-1]
    if isinstance(value, Mapping):
        return {
            (_marked_key(key, marks, seek) if names else key): _marked(inner, marks, numbers, seek, names)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_marked(inner, marks, numbers, seek, names) for inner in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = next(numbers)
        seek.append(str(number))
        return number if isinstance(value, int) else number + 0.5
    return value


def _marked_key(key: Any, marks: Iterator[str], seek: list[str]) -> Any:
    if not isinstance(key, str):
        return key
    seek.append(next(marks))
    return key + seek[-1]


def _renamed(tool: Fields, mark: str) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "name": tool["function"]["name"] + mark}}


def all_in(marks: Sequence[str], text: str) -> bool:
    """Whether all of them are in the text, as they are or as JSON or Python escapes them."""
    return all(any(form in text for form in (mark, json.dumps(mark)[1:-1], repr(mark)[1:-1])) for mark in marks)
