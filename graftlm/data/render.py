"""Messages -> (ids, role of every token), in one pass, by the tokenizer's own chat template.

Training, evaluation and generation all come through here, so what training feeds is what generation feeds.

How the spans are found. The template is a program that cannot be inverted, but it can be run twice: once on the
messages, and once with a private character before and after each message's text. Where the second text without those
characters equals the first, their places are the exact spans of the messages, whatever else the texts contain. No
marker string is searched and no token id is looked for. Token roles follow from character offsets.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers.processors import ByteLevel

from graftlm.data.formats import TEXT, Message
from graftlm.errors import BaseModelError, DataError

MARKS = 0xF0000  # a plane of Unicode that no text may use; two characters a message
MARKS_END = 0xFFFFE


class Role(IntEnum):
    """What a token is part of. Padding has no role because there is none."""

    SPECIAL = 0  # a control token of the tokenizer outside any message's text
    BOILERPLATE = 1  # text that the template writes by itself
    SYSTEM = 2
    USER = 3
    ASSISTANT = 4
    TOOL = 5
    END_OF_TURN = 6  # what the template writes after an answer, up to the token that ends the turn


ROLE_OF = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}


class Rendered(NamedTuple):
    """ids int32 [n] and roles uint8 [n], and the characters that were tokenised."""

    ids: NDArray[np.int32]
    roles: NDArray[np.uint8]
    text: str


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    role: Role


class Renderer:
    """The one way from messages to ids, for one tokenizer and one chat template.

    Raises BaseModelError where there is no chat template or no fast tokenizer, and DataError for messages that the
    template refuses or rewrites.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise BaseModelError(
                f"{type(tokenizer).__name__} has no character offsets, and masks need them: the base must come with a "
                "tokenizer.json (convert it once with transformers' convert_slow_tokenizer)"
            )
        self.tokenizer = tokenizer
        self.template = template if template is not None else tokenizer.chat_template
        self.special_ids = frozenset(int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special)
        self._encoder = copy.deepcopy(backend)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        # Post-processors may trim spaces from offsets and add special tokens; the template alone says what is fed.
        self._encoder.post_processor = ByteLevel(trim_offsets=False)

    @property
    def template_hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the chat template."""
        return hashlib.sha256((self.template or "").encode()).hexdigest()[:16]

    def conversation(self, messages: Sequence[Message]) -> Rendered:
        """The whole conversation as training feeds it."""
        if messages[0].role == TEXT:
            return self._raw(messages[0].content)
        text = self._render(messages)
        spans = self._spans(messages, text)
        prefixes = [self._prefix(messages, i, text) for i, m in enumerate(messages) if m.role == "assistant"]
        ids, offsets = self._encode(text, cuts=[start for start, _ in prefixes])
        roles = np.full(len(ids), Role.BOILERPLATE, np.uint8)
        roles[np.isin(ids, list(self.special_ids))] = Role.SPECIAL
        starts, ends = offsets[:, 0], offsets[:, 1]
        for span in spans:
            roles[(starts < span.end) & (ends > span.start)] = span.role
        answers = [span for span in spans if span.role is Role.ASSISTANT]
        for answer, (_, until) in zip(answers, prefixes, strict=True):
            after = np.flatnonzero((starts >= answer.end) & (ends <= until))
            specials = after[roles[after] == Role.SPECIAL]
            last = specials[0] if len(specials) else after[-1] if len(after) else -1
            roles[after[after <= last]] = Role.END_OF_TURN
        return Rendered(ids, roles, text)

    def prompt(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """The ids after which the model should answer: int32 [n]."""
        return self._encode(self._render(messages, answer_next=True), cuts=[])[0]

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: what training trains as the end of a turn is what generation stops at."""
        probe = [Message("user", "a"), Message("assistant", "b")]
        if self.template is None:
            return tuple(i for i in (self.tokenizer.eos_token_id,) if i is not None)
        rendered = self.conversation(probe)
        ends = rendered.ids[rendered.roles == Role.END_OF_TURN]
        stops = [int(i) for i in ends if int(i) in self.special_ids]
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys(stops + ([int(eos)] if eos is not None else [])))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and without tidying up."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each id by itself, special tokens included."""
        return [str(self.tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)) for i in ids]

    # The template ------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], *, answer_next: bool = False) -> str:
        if self.template is None:
            raise BaseModelError(
                "the tokenizer has no chat template: put a chat_template.jinja beside its tokenizer.json, or name one "
                "with `base: {template: FILE.jinja}`"
            )
        chat = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat, chat_template=self.template, tokenize=False, add_generation_prompt=answer_next
                )
            )
        except Exception as error:  # templates raise what they like
            roles = ", ".join(m.role for m in messages)
            raise DataError(f"the chat template refuses a conversation of {roles}: {error}") from None

    def _spans(self, messages: Sequence[Message], text: str) -> list[_Span]:
        """Where each message's text lies in the rendered text."""
        for mark in (_mark_outside, _mark_inside):
            marked = self._render([mark(m, i) for i, m in enumerate(messages)])
            plain, places = _remove_marks(marked)
            wanted = [2 * i + side for i, m in enumerate(messages) if m.content.strip() for side in (0, 1)]
            if plain == text and all(len(places.get(key, ())) == 1 for key in wanted):
                return [
                    _Span(places[2 * i][0], places[2 * i + 1][0], ROLE_OF[m.role])
                    for i, m in enumerate(messages)
                    if m.content.strip()
                ]
        raise DataError(
            "the chat template rewrites, repeats or drops the text of a message, so it cannot be said which tokens are "
            "the answer. Split the conversation so that every answer is the last message of its row"
        )

    def _prefix(self, messages: Sequence[Message], index: int, text: str) -> tuple[int, int]:
        """For the answer at `index`: where generation would begin it, and where its turn is over."""
        start, until = self._render(messages[:index], answer_next=True), self._render(messages[: index + 1])
        if not text.startswith(until):
            raise DataError(
                f"the chat template changes what it wrote before when message {index + 2} follows, so "
                "generation would never see what training does. Split the conversation so that every answer is the "
                "last message of its row"
            )
        return (len(start) if text.startswith(start) else 0), len(until)

    # The tokenizer -----------------------------------------------------------------------------------------------

    def _encode(self, text: str, cuts: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """ids [n] and character offsets [n, 2]. No token lies across a cut, where generation would have begun."""
        encoding = self._encoder.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        for cut in cuts:
            if ((offsets[:, 0] < cut) & (offsets[:, 1] > cut)).any():
                head = self._encode(text[:cut], [c for c in cuts if c < cut])
                tail = self._encode(text[cut:], [c - cut for c in cuts if c > cut])
                return np.concatenate([head[0], tail[0]]), np.concatenate([head[1], tail[1] + cut])
        return np.array(encoding.ids, np.int32), offsets

    def _raw(self, content: str) -> Rendered:
        """Raw text between the tokenizer's begin and end tokens, where it has them; all of it is to be learnt."""
        ids, _ = self._encode(content, cuts=[])
        roles = np.full(len(ids), Role.ASSISTANT, np.uint8)
        begin = [self.tokenizer.bos_token_id] if getattr(self.tokenizer, "add_bos_token", False) else []
        end = [i for i in (self.tokenizer.eos_token_id,) if i is not None]
        return Rendered(
            np.concatenate([np.array(begin, np.int32), ids, np.array(end, np.int32)]),
            np.concatenate(
                [np.full(len(begin), Role.SPECIAL, np.uint8), roles, np.full(len(end), Role.END_OF_TURN, np.uint8)]
            ),
            content,
        )


def _mark_outside(message: Message, index: int) -> Message:
    return Message(message.role, f"{_mark(index, 0)}{message.content}{_mark(index, 1)}")


def _mark_inside(message: Message, index: int) -> Message:
    """For templates that trim: the marks stand within the white space, which then is not part of the span."""
    core = message.content.strip()
    head, _, tail = message.content.partition(core)
    return Message(message.role, f"{head}{_mark(index, 0)}{core}{_mark(index, 1)}{tail}")


def _mark(index: int, side: int) -> str:
    return chr(MARKS + 2 * index + side)


def _remove_marks(marked: str) -> tuple[str, dict[int, list[int]]]:
    """The text without marks, and for each mark (2 * message + side) the places where it stood, in that text."""
    plain: list[str] = []
    places: dict[int, list[int]] = {}
    length = 0
    for character in marked:
        if MARKS <= ord(character) < MARKS_END:
            places.setdefault(ord(character) - MARKS, []).append(length)
        else:
            plain.append(character)
            length += 1
    return "".join(plain), places


def read_template(path: str | Path) -> str:
    """A chat template from a .jinja file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BaseModelError(f"{path}: cannot be read as a chat template: {error}") from None
