"""Whether a chat template writes all of a conversation: calls, thoughts, tools and the messages of a prompt."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from graftlm.data.chat.forms import Form
from graftlm.data.chat.requests import Work, texts_of
from graftlm.data.chat.spans import core, free_characters
from graftlm.data.chat.written import LostPart, Probe, all_in, needs_probe, probe
from graftlm.data.sources.formats import Fields, Message
from graftlm.errors import DataError

NO_VARIABLES: Fields = {}


def find_lost(
    messages: Sequence[Message],
    tools: Sequence[Fields] = (),
    variables: Fields = NO_VARIABLES,
    form: Form | None = None,
) -> Work[LostPart]:
    """The calls, thoughts and tools that the template does not write."""
    form = form or Form(variables)
    if not needs_probe(messages, tools):
        return LostPart()
    first = yield from _lost_of(form, probe(messages, tools, free_characters(messages, tools), names=True))
    if first is not None and first.calls.keys() <= first.unnamed:
        return first
    # Perhaps it knows functions or arguments by their names.
    marked = probe(messages, tools, free_characters(messages, tools), names=False)
    second = (yield from _lost_of(form, marked)) or marked.lost("")
    if first is None:
        return second
    calls = {i: missing for i, missing in first.calls.items() if i in first.unnamed or i in second.calls}
    return replace(first, calls=calls)


def _lost_of(form: Form, marked: Probe) -> Work[LostPart | None]:
    """None where the template refuses the conversation with these marks."""
    chat = form.fields(marked.messages)
    try:
        (text,) = yield from texts_of(form, chat, [(0, len(chat), False)], marked.tools)
    except DataError:
        return None
    return marked.lost(text)


def check_prompt(
    form: Form, chat: Sequence[Fields], messages: Sequence[Message], tools: Sequence[Fields]
) -> Work[None]:
    """Raise DataError where the template does not write a message into a prompt. What it leaves out of earlier answers
    (their thoughts) is its own affair."""
    prompt_turns = [i for i, message in enumerate(messages) if message.role != "assistant" and message.content.strip()]
    marks = list(islice(free_characters(messages, tools), 2 * len(prompt_turns)))
    around = [
        (i, *core(messages[i].content), *pair)
        for i, pair in zip(prompt_turns, zip(marks[::2], marks[1::2], strict=True), strict=True)
    ]
    if not around:
        return
    (text,) = yield from texts_of(form, chat, [(1, len(messages), True)], tools, around)
    for index, *_, before, after in around:
        if not all_in((before, after), text):
            raise DataError(
                f"the chat template drops message {index + 1} ({messages[index].role}): it has no place for it",
                code="template-drops-message",
            )


def check_calls(index: int, lost: LostPart) -> None:
    """Raise DataError where the template does not write what the answer calls."""
    if index in lost.calls:
        raise DataError(
            f"the chat template drops {lost.calls[index]} in message {index + 1}: it has no place for it, and nobody "
            "would learn to make such a call. Give a template that has with `base: {template: FILE.jinja}`, or leave "
            "such conversations out",
            code="template-drops-calls",
        )
