"""The ways to hand a conversation to a chat template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftlm.data.sources.formats import Fields, Message
from graftlm.errors import DataError

OPEN, CLOSE = "<think>", "</think>"
"""What most templates put around thoughts."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What templates call the thoughts before an answer."""


@dataclass(frozen=True)
class Form:
    """A way to hand a conversation to a template. Some templates can only write a conversation in one of the forms."""

    variables: Fields
    """The variables of the template that the conversation sets."""
    split: bool = False
    """Thoughts within the text of an answer are handed over apart from it."""
    text_arguments: bool = False
    """The arguments of a call are JSON in a text, in place of a mapping."""
    null_content: bool = False
    """A message with calls and no text has no content, in place of an empty one."""
    parts: bool = False
    """Content is a list of one part, in place of a text."""

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        return [split_thoughts(message) if self.split else message for message in messages]

    def fields(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as templates take them; those that know thoughts call them by one of three names."""
        return [self._fields(message) for message in messages]

    def _fields(self, message: Message) -> dict[str, Any]:
        content: Any = [{"type": "text", "text": message.content}] if self.parts else message.content
        if self.null_content and message.tool_calls and not message.content.strip():
            content = None
        fields: dict[str, Any] = {"role": message.role, "content": content}
        if message.tool_calls:
            fields["tool_calls"] = [self._call(call) for call in message.tool_calls]
        if message.call_id:
            fields["tool_call_id"] = message.call_id
        if message.name:
            fields["name"] = message.name
        if message.thinking:
            fields |= dict.fromkeys(THOUGHTS, message.thinking)
        return fields

    def _call(self, call: Fields) -> Fields:
        function = call["function"]
        return {**call, "function": {**function, "arguments": _json(function)}} if self.text_arguments else call

    def check(self, message: Message, text: str) -> None:
        """Raise DataError where what the template wrote of a message with calls shows that it takes another form."""
        functions = [call["function"] for call in message.tool_calls]
        if self.text_arguments and not all(_json(function) in text for function in functions):
            raise DataError(
                "the chat template does not write the JSON text of arguments as it is",
                code="template-changes-arguments",
            )
        if self.null_content and "None" in text and "None" not in f"{functions}{message.all_text}":
            raise DataError("the chat template writes None for a message without content", code="template-writes-none")


def _json(function: Fields) -> str:
    return json.dumps(function["arguments"], ensure_ascii=False)


def split_thoughts(message: Message) -> Message:
    """An answer whose text holds its thoughts, as generation returns it, in two parts; any other message as it is.
    Where the prompt opens the thoughts, the text of an answer only closes them."""
    content = message.content
    if message.role != "assistant" or message.thinking or CLOSE not in content:
        return message
    before, _, answer = content.partition(CLOSE)
    head, opened, thinking = before.partition(OPEN)
    thinking = thinking if opened else head
    if (opened and head.strip()) or not answer.strip():
        return message
    shift = len(content) - len(answer.lstrip("\n"))
    spans = tuple((a - shift, b - shift, weight) for a, b, weight in message.spans if a >= shift)
    return replace(message, content=answer.lstrip("\n"), thinking=thinking.strip("\n"), spans=spans)


def forms_of(messages: Sequence[Message], variables: Fields, *, knows_thoughts: bool) -> list[Form]:
    """Ways to hand over the messages, the usual one first. `knows_thoughts`: whether the template names thoughts."""
    splits = [False]
    with_thoughts = [message for message in messages if split_thoughts(message) is not message]
    if with_thoughts:
        whole = any(OPEN in message.content for message in with_thoughts)
        splits = [True, False] if knows_thoughts and whole else [False, True]
    calls = [message for message in messages if message.tool_calls]
    texts = [False, True] if calls else [False]
    nulls = [False, True] if any(not message.content.strip() for message in calls) else [False]
    plain = [Form(variables, with_thoughts, text, null) for null in nulls for text in texts for with_thoughts in splits]
    return [*plain, *(Form(variables, with_thoughts, parts=True) for with_thoughts in splits)]
