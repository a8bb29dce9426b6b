"""Rendering for one conversation is a generator; here many of them are carried on together.

Each yields what it asks of the chat template and is sent the texts, so the template's process is asked once for many.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from graftlm.data.chat.forms import Form
from graftlm.data.chat.template import Ask, ChatTemplate, TemplateError
from graftlm.data.sources.formats import Fields
from graftlm.errors import BaseModelError, DataError

T = TypeVar("T")
Work = Generator[Ask, list[str], T]
"""A conversation on its way to a T: it yields what the template is asked for, and is sent the texts."""


def run_all(works: Sequence[Work[T]], template: ChatTemplate | None) -> list[T | DataError]:
    """Carry all of them on together, so that the template's process is asked once for many. It renders for one half
    of them while this process is busy with the other."""
    found: dict[int, T | DataError] = {}
    half = len(works) // 2
    asks = _advance(works, dict.fromkeys(range(half)), found, template)
    answers: dict[int, Any] = dict.fromkeys(range(half, len(works)))
    try:
        while asks or answers:
            with template.rendering(list(asks.values())) if template else nullcontext(list) as texts:
                others = _advance(works, answers, found, template)
                answers = dict(zip(asks, texts(), strict=True))
            asks = others
    except TemplateError as error:  # of the template, and of no row
        raise BaseModelError(
            f"the chat template cannot be used: {error}. Mend it, or name another with "
            "`base: {template: FILE.jinja}`",
            code="unusable-chat-template",
        ) from None
    return [found[number] for number in range(len(works))]


def _advance(
    works: Sequence[Work[T]], answers: Mapping[int, Any], found: dict[int, T | DataError], template: ChatTemplate | None
) -> dict[int, Ask]:
    """What these ask next, once they have their answers; what has come to its end is found."""
    asks: dict[int, Ask] = {}
    for number, answer in answers.items():
        try:
            failed = isinstance(answer, TemplateError)
            asks[number] = works[number].throw(answer) if failed else works[number].send(answer)
        except StopIteration as end:
            found[number] = end.value
        except DataError as error:
            found[number] = error
    if asks and template is None:
        raise BaseModelError(
            "the tokenizer has no chat template: put a chat_template.jinja beside its tokenizer.json, or name one "
            "with `base: {template: FILE.jinja}`",
            code="no-chat-template",
        )
    return asks


def texts_of(
    form: Form,
    chat: Sequence[Fields],
    beginnings: Sequence[tuple[int, int, bool]],
    tools: Sequence[Fields],
    marks: Sequence[tuple[int, int, int, str, str]] = (),
) -> Work[list[str]]:
    """The texts of some beginnings of a chat: (1 with marks or 0 without, how many messages, whether an answer is to
    follow)."""
    distinct = list(dict.fromkeys(beginnings))  # up to the last answer is mostly the whole
    try:
        texts = yield Ask([chat], distinct, tools, form.variables, marks)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in chat)
        raise DataError(
            f"the chat template refuses a conversation of {roles}: {error}", code="template-refuses-conversation"
        ) from None
    return [texts[distinct.index(ask)] for ask in beginnings]
