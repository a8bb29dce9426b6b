"""Where the text of each message lies in a rendered conversation.

The template is a program that cannot be inverted, but it can be run twice: once on the messages, and once with a
private character before and after each message's text. Where the second text without those characters equals the first,
their places are the exact spans of the messages, whatever else the texts contain.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from graftlm.data.chat.forms import CLOSE, OPEN, Form
from graftlm.data.chat.requests import Work, texts_of
from graftlm.data.chat.roles import Role
from graftlm.data.chat.written import PRIVATE
from graftlm.data.sources.formats import Fields, Message
from graftlm.errors import DataError

PRIVATE_CHARACTER = re.compile(f"([{chr(PRIVATE.start)}-{chr(PRIVATE.stop - 1)}])")
ROLE_OF = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}


@dataclass(frozen=True)
class Span:
    start: int
    end: int
    role: Role
    content: int
    """Where the message's text would begin if nothing of it had been trimmed."""


class UnstableTemplateError(DataError):
    """The template writes earlier turns otherwise once later ones follow."""


def find_spans(
    form: Form,
    messages: Sequence[Message],
    tools: Sequence[Fields],
    marked: Sequence[int],
    marks: str,
    text: str,
    outside: str,
) -> Work[dict[int, Span]]:
    """Where each marked message's text lies in the rendered text, by the message's index.

    `outside` is the text with a mark before and after each of them. For templates that trim, the marks are set
    within the white space of a message, which then is not part of the span.
    """
    wrong = ""
    for trims in (False, True):
        if trims:
            chat = form.fields(messages)
            inside = [(i, *core(messages[i].content), marks[2 * i], marks[2 * i + 1]) for i in marked]
            (outside,) = yield from texts_of(form, chat, [(1, len(chat), False)], tools, inside)
        plain, places = _remove_marks(outside, marks)
        counts = [(i, len(places[2 * i]), len(places[2 * i + 1])) for i in marked]
        odd = [
            f"{'drops' if 0 in n else 'repeats'} message {i + 1} ({messages[i].role})"
            for i, *n in counts
            if n != [1, 1]
        ]
        if plain == text and not odd:
            spans = {}
            for i in marked:
                start, end = places[2 * i][0], places[2 * i + 1][0]
                head = len(messages[i].content) - len(messages[i].content.lstrip()) if trims else 0
                spans[i] = Span(start, end, ROLE_OF[messages[i].role], start - head)
            answers = [(s, messages[i].content) for i, s in spans.items() if s.role is Role.ASSISTANT]
            if all(text[s.start : s.end].strip() == content.strip() for s, content in answers):
                return spans
        wrong = odd[0] if odd else "rewrites the text of a message"
    raise DataError(
        f"the chat template {wrong}, so it cannot be said which tokens are the answer. If it treats earlier turns "
        "otherwise than the last, split the conversation so that every answer is the last message of its row; "
        "if it has no place for a message of this role, leave such messages out, or give another template with "
        "`base: {template: FILE.jinja}`",
        code="answer-tokens-unknown",
    )


def _ending(text: str) -> str:
    return repr(text[-40:])


def answer_starts(text: str, begins: Iterable[str]) -> list[int]:
    """Where answers begin in the text, as generation began them."""
    return [len(begin) for begin in begins if text.startswith(begin)]


def turn_end(text: str, index: int, until: str) -> int:
    """Where the turn of the answer at `index` is over; `until` is the conversation up to it."""
    if not text.startswith(until):
        raise UnstableTemplateError(
            f"the chat template changes what it wrote before when message {index + 2} follows, so "
            "generation would never see what training does. Split the conversation so that every answer is the "
            "last message of its row",
            code="template-rewrites-turns",
        )
    return len(until)


def prompt_mismatch(index: int, begin: str) -> str:
    return (
        f"the chat template begins the answer of message {index + 1} with {_ending(begin)} when it is to be "
        "generated, and writes something else when it is there, so generation would never see what training does. "
        "Set a variable of the template, as `data: {template_variables: {enable_thinking: true}}`, or give a "
        "template that does the same in both with `base: {template: FILE.jinja}`"
    )


def after_prompt(
    messages: Sequence[Message], spans: Mapping[int, Span], begin: str, text: str
) -> tuple[str, dict[int, Span], set[int]]:
    """The row whose last answer follows its prompt, where the template writes the answer otherwise than it begins it:
    (the text, the spans in it, the messages whose thoughts are in it though the template left them out).

    Many templates open the thoughts in the prompt (`<think>`) and leave them out of an answer. Then the answer is its
    thoughts, what closes them, and what the template writes of the rest. Others write a whole block there, or close a
    turn before: then the answer is its text. Raises DataError where neither can be said.
    """
    index = len(messages) - 1
    message, span = messages[index], spans.get(index)
    opens = begin.rstrip().removesuffix(OPEN)
    inserted: set[int] = set()
    if begin.rstrip().endswith(OPEN) and text.startswith(opens):
        rest = text[len(opens) :]
        line = "\n" if begin.endswith("\n") else ""
        if rest.startswith(OPEN):
            rest = rest[len(OPEN) :].lstrip("\n")
        elif not (CLOSE in message.content and not message.thinking):
            closed = rest if rest.startswith(CLOSE) else f"{CLOSE}{2 * line}{rest}"
            rest = f"{message.thinking}{line}{closed}"
            inserted = {index} if message.thinking else set()
    elif span is not None and not message.thinking and not message.tool_calls:
        common = min(_alike(begin, text), span.start)
        if text[common : span.start].strip():
            raise DataError(prompt_mismatch(index, begin), code="prompt-mismatch")
        rest = text[span.start :]
    else:
        raise DataError(prompt_mismatch(index, begin), code="prompt-mismatch")
    shift = len(begin) + len(rest) - len(text)
    new_spans = dict(spans)
    if span is not None:
        new_spans[index] = replace(span, start=span.start + shift, end=span.end + shift, content=span.content + shift)
    return begin + rest, new_spans, inserted


def _alike(a: str, b: str) -> int:
    """How many characters the texts have in common at their beginning."""
    shorter = min(len(a), len(b))
    return next((place for place in range(shorter) if a[place] != b[place]), shorter)


def core(text: str) -> tuple[int, int]:
    """Where the text begins and ends without the white space around it."""
    return len(text) - len(text.lstrip()), len(text.rstrip())


def free_characters(messages: Sequence[Message], tools: Sequence[Fields] = ()) -> Iterator[str]:
    """Characters for private use that occur nowhere in the conversation (icon fonts use some of them)."""
    odd = [content for message in messages for content in (message.content, message.thinking) if not content.isascii()]
    others = [*(message.tool_calls for message in messages if message.tool_calls), *([tools] if tools else [])]
    odd += [json.dumps(other, ensure_ascii=False, default=str) for other in others]
    used = {character for text in odd for character in PRIVATE_CHARACTER.findall(text)}
    return (character for character in map(chr, PRIVATE) if character not in used)


def _remove_marks(marked: str, marks: str) -> tuple[str, list[list[int]]]:
    """The text without marks, and for each mark the places where it stood, in that text."""
    number = {mark: index for index, mark in enumerate(marks)}
    plain: list[str] = []
    places: list[list[int]] = [[] for _ in marks]
    length = 0
    for part in PRIVATE_CHARACTER.split(marked):  # every second one is a character of these planes
        if part in number:
            places[number[part]].append(length)
        else:
            plain.append(part)
            length += len(part)
    return "".join(plain), places
