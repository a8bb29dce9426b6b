"""Messages -> (ids, role of every token), in one pass, by the tokenizer's own chat template.

Training, evaluation and generation all come through here, so what training feeds is what generation feeds.

How the spans are found. The template is a program that cannot be inverted, but it can be run twice: once on the
messages, and once with a private character before and after each message's text. Where the second text without those
characters equals the first, their places are the exact spans of the messages, whatever else the texts contain. No
marker string is searched and no token id is looked for. Token roles follow from character offsets.

An answer begins where generation would begin it: where the text of the prompt ends. What the template writes between
that place and the answer's own text (a space, an empty block of thoughts) the model has to write by itself, so it
belongs to the answer.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers.processors import ByteLevel

from graftlm.data.formats import TEXT, Fields, Message
from graftlm.errors import BaseModelError, DataError

PRIVATE = range(0xF0000, 0x10FFFE)  # Unicode's two planes for private use; marks are those that no message contains
ANCHORS = ("\n", "a", ".")


class Role(IntEnum):
    """What a token is part of. Padding has no role because there is none."""

    SPECIAL = 0  # a control token of the tokenizer outside any message's text
    BOILERPLATE = 1  # text that the template writes by itself
    SYSTEM = 2
    USER = 3
    ASSISTANT = 4  # from where generation begins an answer to the end of the answer's text
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
        own = tokenizer.chat_template  # text, or for a few tokenizers several templates by name
        own = own.get("default") if isinstance(own, dict) else own
        self.template = template if template is not None else own
        added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_texts = tuple(token.content for token in added.values() if token.special)
        # What can end a turn: some tokenizers have their end of turn as an added token that is not called special, and
        # some have runs of white space as added tokens, which end nothing.
        self._control = sorted(i for i, token in added.items() if token.special or token.content.strip())
        self._encoder = copy.deepcopy(backend)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        # Post-processors may trim spaces from offsets and add special tokens; the template alone says what is fed.
        self._encoder.post_processor = ByteLevel(trim_offsets=False)

    @property
    def template_hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the chat template."""
        return hashlib.sha256((self.template or "").encode()).hexdigest()[:16]

    def rows(self, messages: Sequence[Message], tools: Sequence[Fields] = ()) -> list[Rendered]:
        """The conversation as training feeds it: one row, or one for every answer where the template changes what it
        wrote before when more is said."""
        return [self.conversation(messages, tools)]

    def conversation(self, messages: Sequence[Message], tools: Sequence[Fields] = ()) -> Rendered:
        """The whole conversation in one row."""
        if messages[0].role == TEXT:
            return self._raw(messages[0].content)
        text = self._render(messages)
        spans = self._spans(messages, text)
        turns = {i: self._turn(messages, i, text) for i, m in enumerate(messages) if m.role == "assistant"}
        ids, offsets = self._encode(text, cuts=[begin for begin, _ in turns.values()])
        roles = np.full(len(ids), Role.BOILERPLATE, np.uint8)
        roles[np.isin(ids, list(self.special_ids))] = Role.SPECIAL
        starts, ends = offsets[:, 0], offsets[:, 1]
        control = np.isin(ids, self._control)

        def within(start: int, end: int) -> NDArray[np.bool_]:
            # A control token may swallow white space around it, of a text too: it is part of the text only if inside.
            overlap, inside = (starts < end) & (ends > start), (starts >= start) & (ends <= end)
            return np.where(control, inside, overlap)

        for index, span in spans.items():
            if index not in turns:
                roles[within(span.start, span.end)] = span.role
        for index, (begin, until) in turns.items():
            if index in spans:
                end = spans[index].end
                answer = within(begin, end)
                roles[answer] = Role.ASSISTANT
                after = np.flatnonzero(~answer & (ends > end) & np.where(control, starts < until, ends <= until))
                stops = after[control[after]]
                last = stops[0] if len(stops) else after[-1] if len(after) else -1
                roles[after[after <= last]] = Role.END_OF_TURN
        return Rendered(ids, roles, text)

    def prompt(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """The ids after which the model should answer: int32 [n]."""
        text = self._render(messages, answer_next=True)
        answers = [i for i, m in enumerate(messages) if m.role == "assistant" and i > 0]
        begins = [self._render(messages[:i], answer_next=True) for i in answers]
        return self._encode(text, cuts=[len(begin) for begin in begins if text.startswith(begin)])[0]

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: what training trains as the end of a turn is what generation stops at."""
        probe = [Message("user", "a"), Message("assistant", "b")]
        eos = tuple(int(i) for i in (self.tokenizer.eos_token_id,) if i is not None)
        if self.template is None:
            return eos
        try:
            rendered = self.conversation(probe)
        except DataError:  # nothing can be trained with such a template, but the base can be talked to
            return eos
        ends = rendered.ids[rendered.roles == Role.END_OF_TURN].tolist()
        return tuple(dict.fromkeys([*(i for i in ends if i in self._control), *eos]))

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

    def _spans(self, messages: Sequence[Message], text: str) -> dict[int, _Span]:
        """Where each message's text lies in the rendered text, by the message's index; blank ones have no place."""
        written = [i for i, m in enumerate(messages) if m.content.strip()]
        marks = _free_characters(2 * len(messages), messages)
        wrong = ""
        for place in (_mark_outside, _mark_inside):
            marked = [place(m, marks[2 * i], marks[2 * i + 1]) if i in written else m for i, m in enumerate(messages)]
            plain, places = _remove_marks(self._render(marked), marks)
            counts = [(i, len(places[2 * i]), len(places[2 * i + 1])) for i in written]
            odd = [
                f"{'drops' if 0 in n else 'repeats'} message {i + 1} ({messages[i].role})"
                for i, *n in counts
                if n != [1, 1]
            ]
            if plain == text and not odd:
                spans = {i: _Span(places[2 * i][0], places[2 * i + 1][0], ROLE_OF[messages[i].role]) for i in written}
                answers = [(s, messages[i].content) for i, s in spans.items() if s.role is Role.ASSISTANT]
                if all(text[s.start : s.end].strip() == content.strip() for s, content in answers):
                    return spans
            wrong = odd[0] if odd else "rewrites the text of a message"
        raise DataError(
            f"the chat template {wrong}, so it cannot be said which tokens are the answer. If it treats earlier turns "
            "otherwise than the last, split the conversation so that every answer is the last message of its row; "
            "if it has no place for a message of this role, leave such messages out, or give another template with "
            "`base: {template: FILE.jinja}`"
        )

    def _turn(self, messages: Sequence[Message], index: int, text: str) -> tuple[int, int]:
        """For the answer at `index`: where generation would begin it, and where its turn is over."""
        if index == 0:
            raise DataError("the conversation begins with an answer, and to what? Begin the row with a user message")
        until = self._render(messages[: index + 1])
        if not text.startswith(until):
            raise DataError(
                f"the chat template changes what it wrote before when message {index + 2} follows, so "
                "generation would never see what training does. Split the conversation so that every answer is the "
                "last message of its row"
            )
        begin = self._render(messages[:index], answer_next=True)
        if not text.startswith(begin):
            raise DataError(
                f"the chat template begins the answer of message {index + 1} with {_ending(begin)} when it is to be "
                "generated, and writes something else when it is there, so generation would never see what training "
                "does. Give a template that does the same in both with `base: {template: FILE.jinja}`"
            )
        return len(begin), len(until)

    # The tokenizer -----------------------------------------------------------------------------------------------

    def _encode(self, text: str, cuts: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """ids [n] and character offsets [n, 2]. At each cut generation would have begun: what is before it has the
        very ids that it has as a prompt, whatever follows.

        Mostly that is so by itself, and the text is tokenised as one. It is not where a token would lie across the
        cut, or where what follows changes the tokens before (a regular expression that looks ahead).
        """
        found: list[tuple[NDArray[np.int32], NDArray[np.int64]]] = []
        start = 0
        bounds = [*sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
        head = self._piece(text, 0, bounds[0])
        for cut, until in pairwise(bounds):
            whole = self._piece(text, start, until)
            same = np.array_equal(whole[0][: len(head[0])], head[0])
            across = ((whole[1][:, 0] < cut) & (whole[1][:, 1] > cut)).any()
            if same and not across:
                head = whole
            else:
                found.append(head)
                start, head = cut, self._piece(text, cut, until)
        ids, offsets = zip(*found, head, strict=True)
        return np.concatenate(ids), np.concatenate(offsets)

    def _piece(self, text: str, start: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """ids and offsets of text[start:end]; what does not begin the text is tokenised as what does not."""
        if start == 0:
            return self._plain(text[:end])
        for anchor in ANCHORS:  # some tokenizers put a space before whatever begins a text: let it begin with this
            ids, offsets = self._plain(anchor + text[start:end])
            offsets -= len(anchor)
            if not ((offsets[:, 0] < 0) & (offsets[:, 1] > 0)).any():
                own = offsets[:, 1] > 0
                return ids[own], offsets[own] + start
        ids, offsets = self._plain(text[start:end])
        return ids, offsets + start

    def _plain(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        encoding = self._encoder.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def _raw(self, content: str) -> Rendered:
        """Raw text between the tokenizer's begin and end tokens, where it has them; all of it is to be learnt."""
        ids, _ = self._encode(content, cuts=[])
        begin, end = self._begin_ids, [i for i in (self.tokenizer.eos_token_id,) if i is not None]
        parts = ((begin, Role.SPECIAL), (ids, Role.ASSISTANT), (end, Role.END_OF_TURN))
        return Rendered(
            np.concatenate([np.array(part, np.int32) for part, _ in parts]),
            np.concatenate([np.full(len(part), role, np.uint8) for part, role in parts]),
            content,
        )

    @cached_property
    def _begin_ids(self) -> list[int]:
        """The begin-of-text token, where the tokenizer itself puts it before a text that no template has rendered."""
        bos = self.tokenizer.bos_token_id
        return [int(bos)] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []


def _ending(text: str) -> str:
    return repr(text[-40:])


def _mark_outside(message: Message, before: str, after: str) -> Message:
    return Message(message.role, f"{before}{message.content}{after}")


def _mark_inside(message: Message, before: str, after: str) -> Message:
    """For templates that trim: the marks stand within the white space, which then is not part of the span."""
    core = message.content.strip()
    head, _, tail = message.content.partition(core)
    return Message(message.role, f"{head}{before}{core}{after}{tail}")


def _free_characters(count: int, messages: Sequence[Message]) -> str:
    """Characters for private use that occur in no message (icon fonts use some of them)."""
    used = {character for message in messages for character in message.content}
    return "".join(islice((chr(code) for code in PRIVATE if chr(code) not in used), count))


def _remove_marks(marked: str, marks: str) -> tuple[str, list[list[int]]]:
    """The text without marks, and for each mark the places where it stood, in that text."""
    number = {mark: index for index, mark in enumerate(marks)}
    plain: list[str] = []
    places: list[list[int]] = [[] for _ in marks]
    for character in marked:
        if character in number:
            places[number[character]].append(len(plain))
        else:
            plain.append(character)
    return "".join(plain), places
