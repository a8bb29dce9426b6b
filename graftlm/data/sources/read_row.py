"""A conversation of a file -> a checked Row."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

from graftlm.config.template_variables import check_variables
from graftlm.data.chat.turn_order import TurnOrder, in_order
from graftlm.data.sources.formats import Conversation, Message, RowError, check
from graftlm.data.sources.messages import read_number
from graftlm.data.sources.nulls import clean_calls, clean_tools
from graftlm.data.sources.source import Row


def read_row(
    conversation: Conversation, where: str, record: Mapping[str, Any], score: str | None, turn_order: TurnOrder
) -> tuple[Row, list[str]]:
    """(the checked row, notes on it)"""
    group = record.get("group")
    messages, notes = in_order(conversation.messages, turn_order)
    rejected = tuple(in_order(other, turn_order)[0] for other in conversation.rejected)
    conversation = replace(conversation, messages=messages, rejected=rejected)
    if conversation.tools or conversation.rejected or any(message.tool_calls for message in conversation.messages):
        tools = clean_tools(conversation.tools)
        rejected = tuple(clean_calls(other, tools) for other in conversation.rejected)
        conversation = replace(
            conversation, messages=clean_calls(conversation.messages, tools), tools=tools, rejected=rejected
        )
    notes += _checked(conversation.messages, asks=conversation.asks)
    for number, other in enumerate(conversation.rejected, start=1):
        try:
            _checked(other)
        except RowError as error:
            raise RowError(f"rejected answer {number}: {error}") from None
    if group is None or group == "":
        group = next((m.content for m in conversation.messages if m.role == "user"), conversation.messages[0].content)
    value = None
    if score is not None:
        try:
            value = read_number(record, score)
        except RowError as error:
            raise RowError(f"data.order: by {score}: {error}") from None
    return Row(
        conversation.messages,
        where,
        str(group),
        conversation.tools,
        conversation.rejected,
        conversation.desirable,
        value,
        _variables(record),
    ), notes


def _checked(messages: list[Message], *, asks: bool = False) -> list[str]:
    """The notes of `check`; its error says which `turn_order` would help, where the order of turns is wrong."""
    try:
        return check(messages, asks=asks)
    except RowError as error:
        if hint := _hint(messages, asks):
            raise RowError(f"{error}. {hint}") from None
        raise


def _hint(messages: list[Message], asks: bool) -> str:
    """Which `turn_order` would read the row, and how; empty where none would."""
    for how in get_args(TurnOrder):
        other, notes = in_order(messages, how)
        with suppress(RowError):
            if notes:
                check(other, asks=asks)
                return f"`data: {{turn_order: {how}}}` would read it: {notes[0]}"
    return ""


def _variables(record: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the chat template that a row sets, under our name for them or transformers'."""
    names = [name for name in ("template_variables", "chat_template_kwargs") if record.get(name)]
    if len(names) > 1:
        raise RowError("template_variables and chat_template_kwargs are two names of the same field: give one")
    found = record[names[0]] if names else {}
    if isinstance(found, str):
        with suppress(ValueError):
            found = json.loads(found)
    if not isinstance(found, dict):
        raise RowError(f"field {names[0]!r} must be a mapping of names to values, this is {found!r:.60}")
    try:
        check_variables(found)
    except ValueError as error:
        raise RowError(f"field {names[0]!r}: {error}") from None
    return found
