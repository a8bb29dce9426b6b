"""Conversations whose turns are in another order than templates take: two questions in a row, an answer to nothing, a
late system message. `data.turn_order` says what becomes of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from graftlm.data.sources.messages import Message

TurnOrder = Literal["refuse", "merge", "drop"]
BETWEEN = "\n\n"
"""What stands between the texts of messages that become one."""


def in_order(messages: Sequence[Message], how: TurnOrder) -> tuple[list[Message], list[str]]:
    """(messages in the order of turns, what was done, in words that many rows share).

    `merge` makes one message of two questions or two answers in a row, and puts a late system message before the next
    question. `drop` leaves out questions that nobody answers, answers that nobody asked for and late system messages.
    What neither can save stays as it is, to be refused.
    """
    if how == "refuse":
        return list(messages), []
    return _merged(messages) if how == "merge" else _dropped(messages)


def _merged(messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    found: list[Message] = []
    notes: list[str] = []
    late: list[Message] = []
    for message in messages:
        before = found[-1] if found else None
        if message.role == "system" and before is not None and before.role != "system":
            late.append(message)
            continue
        if late and message.role == "user":
            for system in reversed(late):
                message = _joined(replace(system, role="user", weight=message.weight), message)
            notes.append("a late system message was put before the next question (data.turn_order: merge)")
            late = []
        if before is not None and before.role == message.role and _can_be_one(before, message):
            found[-1] = _joined(before, message)
            notes.append(f"two {message.role} messages in a row were made one (data.turn_order: merge)")
        else:
            found.append(message)
    return [*found, *late], list(dict.fromkeys(notes))


def _dropped(messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    found: list[Message] = []
    notes: list[str] = []
    for message in messages:
        before = found[-1].role if found else ""
        if message.role == "system" and found:
            notes.append("a late system message was left out (data.turn_order: drop)")
        elif message.role == "assistant" and before in ("", "assistant"):
            notes.append("an answer without a question was left out (data.turn_order: drop)")
        elif message.role == "user" and before == "user":
            found[-1] = message
            notes.append("a question without an answer was left out (data.turn_order: drop)")
        else:
            found.append(message)
    return found, list(dict.fromkeys(notes))


def without_system(messages: Sequence[Message], how: TurnOrder) -> list[Message] | None:
    """The messages without the system message at their beginning, for templates that have no place for one: `merge`
    puts its text before the first question, `drop` leaves it out. None where that cannot be done."""
    if how == "refuse" or len(messages) < 2 or messages[0].role != "system":
        return None
    system, first, *rest = messages
    if how == "drop":
        return [first, *rest]
    return [_joined(replace(system, role="user", weight=first.weight), first), *rest] if first.role == "user" else None


def _can_be_one(a: Message, b: Message) -> bool:
    return a.role in ("system", "user", "assistant") and not a.tool_calls and a.weight == b.weight and not b.thinking


def _joined(a: Message, b: Message) -> Message:
    """One message that says both; the weights of spans stay with their characters."""
    parts = [part for part in (a.content, b.content) if part]
    text = BETWEEN.join(parts)
    shift = len(text) - len(b.content)
    spans = (*a.spans, *((start + shift, end + shift, weight) for start, end, weight in b.spans))
    return replace(a, content=text, spans=spans, tool_calls=b.tool_calls, role=b.role)
