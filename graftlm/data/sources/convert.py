"""Rows -> OpenAI's messages, one JSON object a line, which `load_rows` reads back to the same rows.

Beside `messages` and `tools` a line may have what OpenAI has no place for: `rejected` (whole conversations that were
liked less), `desirable` (true or false) and `group`; a message may have `spans`, [start, end, weight] of characters of
its content, and `boilerplate`, [start, end] of the fixed words of a template. Raw text has no messages: its lines are
{text}; a row that only asks has them in {prompt}.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from graftlm.data.chat.turn_order import TurnOrder
from graftlm.data.sources.fields import Unread, unread_notes
from graftlm.data.sources.formats import TEXT, Message
from graftlm.data.sources.load import stream_rows
from graftlm.data.sources.messages import MESSAGE_KEYS
from graftlm.data.sources.records import Problem
from graftlm.data.sources.source import Row, SourceConfig
from graftlm.errors import DataError, numbered
from graftlm.files import check_lines, check_new, whole


def convert(
    source: str | SourceConfig,
    out: Path,
    *,
    overwrite: bool = False,
    strict: bool = False,
    network: bool = False,
    turn_order: TurnOrder = "refuse",
) -> tuple[int, list[Problem]]:
    """Write the rows of a source to `out` as they come; returns how many there are and what is wrong with the source.

    `out` appears whole or not at all. Raises OutputError where it exists already and must not be overwritten, or does
    not end in .jsonl, and DataError where no row can be used or, under `strict`, where one cannot.
    """
    check_lines(out)
    check_new(out, overwrite=overwrite)
    problems: list[Problem] = []
    unread: dict[str, Unread] = {}

    def lines() -> Iterator[dict[str, Any]]:
        for found in stream_rows(source, network=network, turn_order=turn_order):
            if isinstance(found, Problem):
                problems.append(found)
            else:
                if found.unread:
                    unread[found.where] = found.unread
                yield to_fields(found)

    path = source if isinstance(source, str) else source.path
    with whole(out) as draft:
        count = write_lines(draft, lines())
        left_out = [str(problem) for problem in problems if problem.left_out]
        if not count or (strict and left_out):
            listed = f":\n{numbered(left_out)}" if left_out else ""
            raise DataError(f"{path}: {count} rows can be used, {len(left_out)} cannot{listed}", code="unusable-rows")
    return count, [
        *(Problem(path, line, left_out=False) for line in unread_notes(unread.items(), MESSAGE_KEYS)),
        *problems,
    ]


def write_lines(file: Path, lines: Iterable[Any]) -> int:
    """Write JSON by the line; returns how many lines there are."""
    count = 0
    with file.open("w", encoding="utf-8") as out:
        for line in lines:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count


def to_fields(row: Row) -> dict[str, Any]:
    """The line of a row."""
    first = row.messages[0]
    fields: dict[str, Any] = {"text": first.content} if first.role == TEXT else {}
    if first.role != TEXT:
        answered = any(message.role == "assistant" for message in row.messages)
        fields["messages" if answered else "prompt"] = _messages(row.messages)
    if row.tools:
        fields["tools"] = list(row.tools)
    if row.variables:
        fields["template_variables"] = dict(row.variables)
    if row.rejected:
        fields["rejected"] = [_messages(other) for other in row.rejected]
    if row.desirable is not None:
        fields["desirable"] = row.desirable
    question = next((m.content for m in row.messages if m.role == "user"), first.content)
    return fields if row.group == question else fields | {"group": row.group}


def _messages(messages: list[Message]) -> list[dict[str, Any]]:
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["content"] = message.content or None
        fields["tool_calls"] = [_call(dict(call)) for call in message.tool_calls]
    if message.call_id:
        fields["tool_call_id"] = message.call_id
    if message.name:
        fields["name"] = message.name
    if message.thinking:
        fields["reasoning_content"] = message.thinking
    if message.weight is not None:
        fields["weight" if message.weight <= 1 else "loss_scale"] = message.weight  # OpenAI's ends at 1
    if message.spans:
        fields["spans"] = [list(span) for span in message.spans]
    if message.boilerplate:
        fields["boilerplate"] = [list(span) for span in message.boilerplate]
    return fields


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI has the arguments as JSON in a text."""
    function = call["function"]
    return call | {"function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
