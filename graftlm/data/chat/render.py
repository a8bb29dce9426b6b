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
import datetime
import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers.processors import ByteLevel

from graftlm.config.template_variables import names_in
from graftlm.data.chat.fast_bpe import Words
from graftlm.data.chat.template import Ask, Template, TemplateError
from graftlm.data.chat.turn_order import TurnOrder, without_system
from graftlm.data.chat.written import PRIVATE, Lost, Probe, all_in, needs_probe, probe
from graftlm.data.sources.formats import TEXT, Fields, Message
from graftlm.errors import BaseModelError, DataError

_PRIVATE = re.compile(f"([{chr(PRIVATE.start)}-{chr(PRIVATE.stop - 1)}])")
ANCHORS = ("\n", "a", ".")
OPEN, CLOSE = "<think>", "</think>"
"""What most templates put around thoughts."""
BROKEN = "\ufffd"
"""What decoding writes for bytes that are no whole character."""
MOST_PIECES = 16
"""Tokens that are looked at together to find whole characters: a character has four bytes at most."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What templates call the thoughts before an answer."""


class Role(IntEnum):
    """What a token is part of. Padding has no role because there is none."""

    SPECIAL = 0  # a control token of the tokenizer outside any message's text
    BOILERPLATE = 1  # text that the template writes by itself
    SYSTEM = 2
    USER = 3
    ASSISTANT = 4  # from where generation begins an answer to the end of the answer's text
    TOOL = 5
    END_OF_TURN = 6  # what the template writes after an answer, up to the token that ends the turn

    @property
    def label(self) -> str:
        """Its name for people: `end-of-turn`."""
        return self.name.lower().replace("_", "-")


ROLE_OF = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}


class Rendered(NamedTuple):
    """A row of n tokens, and the characters that were tokenised."""

    ids: NDArray[np.int32]
    roles: NDArray[np.uint8]
    text: str
    turns: NDArray[np.int32]
    """The index of the message that a token belongs to."""
    given: NDArray[np.float32]
    """The weight that the row itself gives to a token; NaN where it leaves that to the mask."""
    first: int = 0
    """Messages before this one are trained in another row of the same conversation: here they are only read."""
    more: bool = False
    """Whether a later answer of the same conversation is trained in another row: then the last one is not here."""
    lost_thoughts: bool = False
    """Whether an answer that is trained has thoughts that the template does not write."""
    lost_tools: bool = False
    """Whether the template does not write all tools."""
    moved_system: bool = False
    """Whether the template has no place for the system message, and `turn_order` says where it went. Messages are then
    counted without it."""


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    role: Role
    content: int
    """Where the message's text would begin if nothing of it had been trimmed."""


class _Tokens(NamedTuple):
    """Of a text of n tokens, in order: neither starts nor ends go back."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    """The character that each begins with."""
    ends: NDArray[np.int64]
    controls: list[int]
    """The places of control tokens."""


T = TypeVar("T")
NO_VARIABLES: Fields = {}
Asked = tuple[Sequence[Message], Sequence[Fields]] | tuple[Sequence[Message], Sequence[Fields], Fields]
"""A conversation: messages, tools and, where it sets any, variables of the template."""
Work = Generator[Ask, list[str], T]
"""A conversation on its way to a T: it yields what the template is asked for, and is sent the texts."""

Rows = list[Rendered] | DataError


class UnstableTemplateError(DataError):
    """The template writes earlier turns otherwise once later ones follow."""


class Renderer:
    """The one way from messages to ids, for one tokenizer and one chat template.

    `today` is the day for templates that write the date: that of a run, so that its rows stay the same; None is the day
    on which the renderer is made. `turn_order` is about system messages that the template has no place for: `refuse`,
    `merge` (into the first question) or `drop`.

    Raises BaseModelError where there is no chat template or no fast tokenizer, and DataError for messages that the
    template refuses or rewrites.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        *,
        today: datetime.date | None = None,
        turn_order: TurnOrder = "refuse",
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise BaseModelError(
                f"{type(tokenizer).__name__} has no character offsets, and masks need them: the base must come with a "
                "tokenizer.json (convert it once with transformers' convert_slow_tokenizer)"
            )
        self.tokenizer = tokenizer
        self._end_ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self._end_texts = [] if tokenizer.eos_token is None else [str(tokenizer.eos_token)]
        own = tokenizer.chat_template  # text, or for a few tokenizers several templates by name
        own = own.get("default") if isinstance(own, dict) else own
        self.template = template if template is not None else own
        added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_texts = tuple(token.content for token in added.values() if token.special)
        # What can end a turn: some tokenizers have their end of turn as an added token that is not called special, and
        # some have runs of white space as added tokens, which end nothing.
        self._control = sorted(i for i, token in added.items() if token.special or token.content.strip())
        count = max(added, default=-1) + 2  # the last one stands for all that are higher
        self._is_control = np.zeros(count, np.bool_)
        self._is_control[self._control] = True
        self._outside = np.full(count, Role.BOILERPLATE, np.uint8)
        """The role of each id where it is part of no message's text."""
        self._outside[list(self.special_ids)] = Role.SPECIAL
        self._encoder = copy.deepcopy(backend)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        # Post-processors may trim spaces from offsets and add special tokens; the template alone says what is fed.
        self._encoder.post_processor = ByteLevel(trim_offsets=False)
        self._words = Words.of(self._encoder)
        variables = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        self.today = today or datetime.date.today()
        self.turn_order = turn_order
        self._chat = None if self.template is None else Template(self.template, variables, self.today)
        self._names = names_in(self.template or "")
        self._knows_thoughts = "reasoning_content" in (self.template or "")

    def for_rows(self) -> "Renderer":
        """A copy that renders rows and no more. It is quick to send to another process, which need not import
        transformers for it."""
        own = copy.copy(self)
        own.__dict__.update(tokenizer=None, _begin_ids=self._begin_ids)
        return own

    @property
    def template_hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the chat template."""
        return hashlib.sha256((self.template or "").encode()).hexdigest()[:16]

    @property
    def writes_the_date(self) -> bool:
        """Whether the template can write `today` into rows."""
        return "strftime_now" in self._names

    def unread(self, variables: Fields) -> list[str]:
        """Those of the variables that the template does not read."""
        return [name for name in variables if name not in self._names]

    def rows(
        self, messages: Sequence[Message], tools: Sequence[Fields] = (), variables: Fields = NO_VARIABLES
    ) -> list[Rendered]:
        """The conversation as training feeds it: one row, or one for every answer where the template changes what it
        wrote before when more is said (many leave out what was thought before earlier answers). `variables` are those
        of the template that this conversation sets."""
        return self._alone(self._rows(messages, tools, variables))

    def rows_of_all(self, conversations: Sequence[Asked]) -> list[Rows]:
        """What `rows` returns for each of many conversations, or the DataError that it raises."""
        return self._together([self._rows(*conversation) for conversation in conversations])

    def conversation(self, messages: Sequence[Message], tools: Sequence[Fields] = ()) -> Rendered:
        """The whole conversation in one row; UnstableTemplateError where generation would never see it so."""
        return self._alone(self._conversation(messages, tools, NO_VARIABLES))

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Fields] = (), variables: Fields = NO_VARIABLES
    ) -> NDArray[np.int32]:
        """The ids after which the model should answer: int32 [n]."""
        return self._alone(self._prompt(messages, tools, variables))

    def prompts_of_all(self, conversations: Sequence[Asked]) -> list[NDArray[np.int32] | DataError]:
        """What `prompt` returns for each of many conversations, or the DataError that it raises."""
        return self._together([self._prompt(*conversation) for conversation in conversations])

    def lost_of_all(self, conversations: Sequence[Asked]) -> list[Lost | DataError]:
        """What the template does not write of each of many conversations, or the DataError that it raises."""
        return self._together([_lost(*conversation) for conversation in conversations])

    # Rendering is written for one conversation and done for many: each is a generator that yields what it wants to know
    # of the template or of the tokenizer, and is sent the answer.

    def _alone(self, work: Work[T]) -> T:
        (found,) = self._together([work])
        if isinstance(found, DataError):
            raise found
        return found

    def _together(self, works: Sequence[Work[T]]) -> list[T | DataError]:
        """Carry all of them on together, so that the template's process is asked once for many. It renders for one half
        of them while this process is busy with the other."""
        found: dict[int, T | DataError] = {}
        half = len(works) // 2
        asks = self._carried_on(works, dict.fromkeys(range(half)), found)
        answers: dict[int, Any] = dict.fromkeys(range(half, len(works)))
        try:
            while asks or answers:
                with self._chat.rendering(list(asks.values())) if self._chat else nullcontext(list) as texts:
                    others = self._carried_on(works, answers, found)
                    answers = dict(zip(asks, texts(), strict=True))
                asks = others
        except TemplateError as error:  # of the template, and of no row
            raise BaseModelError(
                f"the chat template cannot be used: {error}. Mend it, or name another with `base: {{template: "
                "FILE.jinja}`"
            ) from None
        return [found[number] for number in range(len(works))]

    def _carried_on(
        self, works: Sequence[Work[T]], answers: Mapping[int, Any], found: dict[int, T | DataError]
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
        if asks and self._chat is None:
            raise BaseModelError(
                "the tokenizer has no chat template: put a chat_template.jinja beside its tokenizer.json, or name one "
                "with `base: {template: FILE.jinja}`"
            )
        return asks

    def _rows(
        self, messages: Sequence[Message], tools: Sequence[Fields] = (), variables: Fields = NO_VARIABLES
    ) -> Work[list[Rendered]]:
        def rows(messages: Sequence[Message]) -> Work[list[Rendered]]:
            return self._split_rows(messages, tools, variables)

        found, moved = yield from self._with_system(messages, rows)
        return [row._replace(moved_system=True) for row in found] if moved else found

    def _with_system(
        self, messages: Sequence[Message], attempt: Callable[[Sequence[Message]], Work[T]]
    ) -> Work[tuple[T, bool]]:
        """What `attempt` finds, and whether the template has no place for the system message, which `turn_order` then
        took away from the beginning."""
        try:
            return (yield from attempt(messages)), False
        except DataError as error:
            if messages[0].role != "system":
                raise
            if self.turn_order == "refuse":
                raise type(error)(
                    f"{error}. If it has no place for the system message: turn_order: merge (under `data` in a recipe, "
                    "--turn-order of graft chat) puts it before the first question, drop leaves it out"
                ) from None
            moved = without_system(messages, self.turn_order)
            if moved is None:
                raise
            try:
                return (yield from attempt(moved)), True
            except DataError:
                raise error from None

    def _split_rows(
        self, messages: Sequence[Message], tools: Sequence[Fields], variables: Fields
    ) -> Work[list[Rendered]]:
        try:
            return [(yield from self._conversation(messages, tools, variables))]
        except UnstableTemplateError:
            found, first = [], 0
            answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
            for index in answers:
                # Of such an answer only itself is to be learnt: the rest is as generation has it.
                last = yield from self._rendered(messages[: index + 1], tools, variables, [index])
                found.append(last._replace(first=first, more=index != answers[-1]))
                first = index + 1
            return found

    def _conversation(self, messages: Sequence[Message], tools: Sequence[Fields], variables: Fields) -> Work[Rendered]:
        if messages[0].role == TEXT:
            return self._raw(messages[0])
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        return (yield from self._rendered(messages, tools, variables, answers))

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Fields], variables: Fields, answers: Sequence[int]
    ) -> Work[Rendered]:
        """ids and roles, those of the answers at these indices exact: what other answers hold is only text here."""
        if 0 in answers:
            raise DataError("the conversation begins with an answer, and to what? Begin the row with a user message")

        def rendered(form: _Form) -> Work[tuple[Rendered, bool]]:
            return self._rendered_as(form, messages, tools, answers)

        return (yield from self._in_a_form(messages, variables, rendered))

    def _in_a_form(
        self, messages: Sequence[Message], variables: Fields, attempt: Callable[["_Form"], Work[tuple[T, bool]]]
    ) -> Work[T]:
        """What `attempt` finds in the first form of the messages of which the template loses nothing; else in the first
        one that it can render. Raises the DataError of the first form where it can render none."""
        found: list[T] = []
        errors: list[DataError] = []
        for form in self._forms(messages, variables):
            try:
                one, whole = yield from attempt(form)
            except UnstableTemplateError:
                raise
            except DataError as error:
                errors.append(error)
                continue
            if whole:
                return one
            found.append(one)
        if not found:
            raise errors[0]
        return found[0]

    def _forms(self, messages: Sequence[Message], variables: Fields) -> list["_Form"]:
        """Ways to hand over the messages, the usual one first."""
        splits = [False]
        split = [message for message in messages if _split(message) is not message]
        if split:
            whole = any(OPEN in message.content for message in split)
            splits = [True, False] if self._knows_thoughts and whole else [False, True]
        calls = [message for message in messages if message.tool_calls]
        texts = [False, True] if calls else [False]
        nulls = [False, True] if any(not message.content.strip() for message in calls) else [False]
        plain = [_Form(variables, split, text, null) for null in nulls for text in texts for split in splits]
        return [*plain, *(_Form(variables, split, parts=True) for split in splits)]

    def _rendered_as(
        self, form: "_Form", messages: Sequence[Message], tools: Sequence[Fields], answers: Sequence[int]
    ) -> Work[tuple[Rendered, bool]]:
        """The row, and whether nothing is lost that another form may save."""
        own, messages = messages, form.messages(messages)
        marked = [i for i, m in enumerate(messages) if m.content.strip() and (m.role != "assistant" or i in answers)]
        marks = "".join(islice(_free_characters(messages, tools), 2 * len(messages)))
        count = len(messages)
        said = [i for i, m in enumerate(messages) if m.role == "assistant" and i > 0]
        wanted = [(0, count, False), (1, count, False), *((0, i, True) for i in said)]
        wanted += [(0, i + 1, False) for i in answers]
        chat = form.fields(messages)
        around = [(i, 0, len(messages[i].content), marks[2 * i], marks[2 * i + 1]) for i in marked]
        if not around:  # nothing to look for
            wanted[1] = wanted[0]
        text, outside, *prefixes = yield from _texts(form, chat, wanted, tools, around)
        begins = dict(zip(said, prefixes, strict=False))
        spans = yield from self._spans(form, messages, tools, marked, marks, text, outside)
        untils = zip(answers, prefixes[len(said) :], strict=True)
        turns = {i: _turn(text, i, until) for i, until in untils}
        other = [i for i in answers if not text.startswith(begins[i])]
        inserted: set[int] = set()
        if other and answers == [count - 1]:
            text, spans, inserted = _after_prompt(messages, spans, begins[count - 1], text)
            turns = {count - 1: len(text)}
        elif other:
            raise UnstableTemplateError(_begins_otherwise(other[0], begins[other[0]]))
        lost = yield from _lost(messages, tools, form=form)
        for i, until in turns.items():
            _check_calls(i, lost)
            form.check(messages[i], text[len(begins[i]) : until])
        bounds = {i: (len(begins[i]), until) for i, until in turns.items()}
        tokens = self._encode(text, cuts=_cuts(text, begins.values()))
        roles, turn_of = self._roles(messages, spans, bounds, tokens, len(text))
        _set_boilerplate(messages, spans, roles, turn_of, tokens)
        given = _given(messages, spans, roles, turn_of, tokens.starts)
        thoughts = {i for i in lost.thoughts - inserted if i in answers and messages[i].weight != 0}
        row = Rendered(tokens.ids, roles, text, turn_of, given, lost_thoughts=bool(thoughts), lost_tools=lost.tools)
        return row, not lost.calls and not any(messages[i] is not own[i] for i in thoughts)

    def _roles(
        self,
        messages: Sequence[Message],
        spans: Mapping[int, _Span],
        turns: Mapping[int, tuple[int, int]],
        tokens: _Tokens,
        length: int,
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """The role of every token, and the message that it belongs to; `turns` are those of the answers."""
        starts, ends, controls = tokens.starts, tokens.ends, tokens.controls
        parts = {index: (span.start, span.end) for index, span in spans.items()}
        over = {index: span.end for index, span in spans.items()}  # where a message ends
        for index in (i for i, m in enumerate(messages) if m.role == "assistant" and i not in turns):
            over[index] = min((span.start for i, span in spans.items() if i > index), default=length)
        for index, (begin, until) in turns.items():
            if messages[index].tool_calls:
                parts[index] = begin, until
            elif index in spans:
                parts[index] = begin, spans[index].end
            else:
                continue
            over[index] = until
        closed = sorted((end, index) for index, end in over.items())

        # As no token goes back, what overlaps a part of the text are the tokens from one place to another.
        places = [part[0] for part in parts.values()] + [part[1] for part in parts.values()]
        after = ends.searchsorted([*places, *(end for end, _ in closed)], "right").tolist()
        before = starts.searchsorted([*places[len(parts) :], *(until for _, until in turns.values())], "left").tolist()
        bounds = dict(zip(turns, before[len(parts) :], strict=True))

        roles = self._outside.take(tokens.ids, mode="clip")
        for (index, (start, end)), first, last, beyond in zip(
            parts.items(), after, before, after[len(parts) :], strict=False
        ):
            # A control token may swallow white space around it, of a text too: it is part of the text only if inside.
            inside = controls[bisect_left(controls, first) : bisect_left(controls, last)]
            across = [place for place in inside if starts[place] < start or ends[place] > end] if inside else []
            kept = roles[across] if across else roles[:0]
            answer = index in turns
            roles[first:last] = Role.ASSISTANT if answer else spans[index].role
            if answer and messages[index].tool_calls:
                # Written by the template from the calls: its last control token is what ends the turn.
                stops = self._stops(messages[index], [p for p in inside if p not in across], tokens.ids)
                if stops:
                    roles[stops[-1]] = Role.END_OF_TURN
                    roles[stops[-1] + 1 : last] = Role.BOILERPLATE
            if across:
                roles[across] = kept
            if answer and not messages[index].tool_calls:
                until = turns[index][1]
                for place in chain((p for p in across if p >= beyond), range(max(last, beyond), bounds[index])):
                    if self._is_control.take(tokens.ids[place], mode="clip"):
                        roles[place : self._end(tokens, place, bounds[index])] = Role.END_OF_TURN
                        break
                    if ends[place] <= until:
                        roles[place] = Role.END_OF_TURN
        numbers = np.array([index for _, index in closed] + [len(messages) - 1], np.int32)
        return roles, numbers.repeat([b - a for a, b in pairwise([0, *after[2 * len(parts) :], len(starts)])])

    def _end(self, tokens: _Tokens, place: int, bound: int) -> int:
        """Where the end of an answer is over whose first control token is at `place`: behind the end-of-text token if
        nothing but control tokens stands before it, else behind the first one."""
        run = place
        while run < bound and self._is_control.take(tokens.ids[run], mode="clip"):
            if tokens.ids[run] in self._end_ids:
                return run + 1
            run += 1
        return place + 1

    def _stops(self, message: Message, controls: list[int], ids: NDArray[np.int32]) -> list[int]:
        """Those of the control tokens of a turn with calls that may end it. Some templates open the next turn behind
        the end-of-text token; where the message itself says that token, all of them may."""
        ends = [place for place in controls if ids[place] in self._end_ids]
        said = any(text in message.all_text for text in self._end_texts)
        return controls if said or not ends else ends

    def _prompt(
        self, messages: Sequence[Message], tools: Sequence[Fields] = (), variables: Fields = NO_VARIABLES
    ) -> Work[NDArray[np.int32]]:
        def prompted(messages: Sequence[Message]) -> Work[NDArray[np.int32]]:
            return self._in_a_form(messages, variables, lambda form: self._prompt_as(form, messages, tools))

        return (yield from self._with_system(messages, prompted))[0]

    def _prompt_as(
        self, form: "_Form", messages: Sequence[Message], tools: Sequence[Fields]
    ) -> Work[tuple[NDArray[np.int32], bool]]:
        """The ids, and whether nothing is lost that another form may save."""
        own, messages = messages, form.messages(messages)
        said = [i for i, m in enumerate(messages) if m.role == "assistant" and i > 0]
        chat = form.fields(messages)
        text, *begins = yield from _texts(form, chat, [(0, i, True) for i in (len(messages), *said)], tools)
        yield from _check_written(form, chat, messages, tools)
        lost = yield from _lost(messages, form=form)
        for message in messages:
            form.check(message, text)
        whole = not lost.calls and not any(messages[i] is not own[i] for i in lost.thoughts)
        return self._encode(text, cuts=_cuts(text, begins)).ids, whole

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: what training trains as the end of a turn is what generation stops at."""
        probe = [Message("user", "a"), Message("assistant", "b")]
        eos = self._end_ids
        if self.template is None:
            return tuple(eos)
        try:
            rendered = self.conversation(probe)
        except DataError:  # nothing can be trained with such a template, but the base can be talked to
            return tuple(eos)
        ends = rendered.ids[rendered.roles == Role.END_OF_TURN].tolist()
        return tuple(dict.fromkeys([*(i for i in ends if i in self._control), *eos]))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and without tidying up."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, special tokens included. Of a character that several tokens make, the first has all of
        it and the others have none."""
        texts: list[str] = []
        while (start := len(texts)) < len(ids):
            text = self._text(ids[start : start + 1])
            if BROKEN not in text:
                texts.append(text)
                continue
            if list(ids[start : start + len(self._broken_ids)]) == self._broken_ids:  # the text itself has it
                texts += [BROKEN, *[""] * (len(self._broken_ids) - 1)]
                continue
            # tokens may hold the end of one character and the beginning of the next: all that hang together
            ends = range(start + 2, min(len(ids), start + MOST_PIECES) + 1)
            whole = ((end, self._text(ids[start:end])) for end in ends)
            end, text = next(((end, found) for end, found in whole if BROKEN not in found), (start + 1, text))
            texts += [text, *[""] * (end - start - 1)]
        return texts

    @cached_property
    def _broken_ids(self) -> list[int]:
        return list(self._encoder.encode(BROKEN, add_special_tokens=False).ids)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False))

    def _spans(
        self,
        form: "_Form",
        messages: Sequence[Message],
        tools: Sequence[Fields],
        marked: Sequence[int],
        marks: str,
        text: str,
        outside: str,
    ) -> Work[dict[int, _Span]]:
        """Where each marked message's text lies in the rendered text, by the message's index.

        `outside` is the text with a mark before and after each of them. For templates that trim, the marks are set
        within the white space of a message, which then is not part of the span.
        """
        wrong = ""
        for trims in (False, True):
            if trims:
                chat = form.fields(messages)
                inside = [(i, *_core(messages[i].content), marks[2 * i], marks[2 * i + 1]) for i in marked]
                (outside,) = yield from _texts(form, chat, [(1, len(chat), False)], tools, inside)
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
                    spans[i] = _Span(start, end, ROLE_OF[messages[i].role], start - head)
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

    # The tokenizer -----------------------------------------------------------------------------------------------

    def _encode(self, text: str, cuts: Sequence[int]) -> _Tokens:
        """The text's tokens. At each cut generation would have begun: what is before it has the very ids that it has
        as a prompt, whatever follows.

        Mostly that is so by itself, and the text is tokenised as one. It is not where a token would lie across the
        cut, or where what follows changes the tokens before (a regular expression that looks ahead).
        """
        whole = self._piece(text, 0, len(text))
        if all(self._is_prompt(text, cut, whole) for cut in cuts):
            return whole
        found: list[_Tokens] = []
        start = 0
        bounds = [*sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
        head = self._piece(text, 0, bounds[0])
        for cut, until in pairwise(bounds):
            whole = self._piece(text, start, until)
            same = np.array_equal(whole.ids[: len(head.ids)], head.ids)
            across = ((whole.starts < cut) & (whole.ends > cut)).any()
            if same and not across:
                head = whole
            else:
                found.append(head)
                start, head = cut, self._piece(text, cut, until)
        found.append(head)
        ids = np.concatenate([part.ids for part in found])
        starts, ends = (np.concatenate([getattr(part, name) for part in found]) for name in ("starts", "ends"))
        return self._tokens(ids, starts, ends)

    def _is_prompt(self, text: str, cut: int, tokens: _Tokens) -> bool:
        """Whether the tokens of the text before the cut are the very tokens that text[:cut] has by itself.

        What stands before a control token is tokenised apart from what follows it, so only the tokens from the last
        one on can be others.
        """
        before = int(tokens.ends.searchsorted(cut, "right"))
        if before < len(tokens.ids) and tokens.starts[before] < cut:
            return False  # a token lies across
        earlier = bisect_left(tokens.controls, before)
        first = tokens.controls[earlier - 1] if earlier else 0
        tail = text[tokens.starts[first] if first else 0 : cut]
        found = self._words.ids(tail) if self._words is not None else None
        if found is None:
            return bool(self._encoder.encode(tail, add_special_tokens=False).ids == tokens.ids[first:before].tolist())
        return found == tokens.ids[first:before].tobytes()

    def _piece(self, text: str, start: int, end: int) -> _Tokens:
        """The tokens of text[start:end]; what does not begin the text is tokenised as what does not."""
        if start == 0:
            return self._tokens(*self._plain(text[:end]))
        for anchor in ANCHORS:  # some tokenizers put a space before whatever begins a text: let it begin with this
            ids, starts, ends = self._plain(anchor + text[start:end])
            shift = start - len(anchor)
            if not ((starts < len(anchor)) & (ends > len(anchor))).any():
                own = ends > len(anchor)
                return self._tokens(ids[own], starts[own] + shift, ends[own] + shift)
        ids, starts, ends = self._plain(text[start:end])
        return self._tokens(ids, starts + start, ends + start)

    def _tokens(self, ids: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> _Tokens:
        return _Tokens(ids, starts, ends, self._is_control.take(ids, mode="clip").nonzero()[0].tolist())

    def _plain(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        if self._words is not None and (found := self._words.encode(text)) is not None:
            return found
        encoding = self._encoder.encode(text, add_special_tokens=False)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64)
        starts, ends = offsets[::2], offsets[1::2]
        if (starts[1:] < starts[:-1]).any() or (ends[1:] < ends[:-1]).any():
            raise DataError("the tokenizer gives places of tokens that go back, so it cannot be said what they are of")
        return np.array(encoding.ids, np.int32), starts, ends

    def _raw(self, message: Message) -> Rendered:
        """Raw text between the tokenizer's begin and end tokens, where it has them; all of it is to be learnt."""
        ids, starts, _, _ = self._encode(message.content, cuts=[])
        begin, end = self._begin_ids, self._end_ids
        parts = ((begin, Role.SPECIAL), (ids, Role.ASSISTANT), (end, Role.END_OF_TURN))
        roles = np.concatenate([np.full(len(part), role, np.uint8) for part, role in parts])
        given = np.full(len(roles), np.nan if message.weight is None else message.weight, np.float32)
        for start, stop, weight in message.spans:
            at = np.flatnonzero((starts >= start) & (starts < stop))
            given[len(begin) + at] = weight
        return Rendered(
            np.concatenate([np.array(part, np.int32) for part, _ in parts]),
            roles,
            message.content,
            np.zeros(len(roles), np.int32),
            given,
        )

    @cached_property
    def _begin_ids(self) -> list[int]:
        """The begin-of-text token, where the tokenizer itself puts it before a text that no template has rendered."""
        bos = self.tokenizer.bos_token_id
        return [int(bos)] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []


def _texts(
    form: "_Form",
    chat: Sequence[Fields],
    wanted: Sequence[tuple[int, int, bool]],
    tools: Sequence[Fields],
    marks: Sequence[tuple[int, int, int, str, str]] = (),
) -> Work[list[str]]:
    """The texts of some beginnings of a chat: (1 with marks or 0 without, how many messages, whether an answer is to
    follow)."""
    different = list(dict.fromkeys(wanted))  # up to the last answer is mostly the whole
    try:
        texts = yield Ask([chat], different, tools, form.variables, marks)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in chat)
        raise DataError(f"the chat template refuses a conversation of {roles}: {error}") from None
    return [texts[different.index(ask)] for ask in wanted]


def _given(
    messages: Sequence[Message],
    spans: Mapping[int, _Span],
    roles: NDArray[np.uint8],
    turns: NDArray[np.int32],
    starts: NDArray[np.int64],
) -> NDArray[np.float32]:
    """The weights that the row itself gives its tokens; NaN where it gives none."""
    given = np.empty(len(roles), np.float32)
    given.fill(np.nan)
    for index, message in enumerate(messages):
        if message.weight is None and not message.spans:
            continue
        own = (turns == index) & ~np.isin(roles, (Role.SPECIAL, Role.BOILERPLATE))
        if message.weight is not None:
            given[own] = message.weight
        for start, stop, weight in message.spans:
            if index in spans:
                at = spans[index].content
                given[own & (starts >= at + start) & (starts < at + stop)] = weight
    return given


def _set_boilerplate(
    messages: Sequence[Message],
    spans: Mapping[int, _Span],
    roles: NDArray[np.uint8],
    turns: NDArray[np.int32],
    tokens: _Tokens,
) -> None:
    """Give tokens that are wholly fixed words of a row's template the role of what templates write."""
    for index, span in spans.items():
        for start, end in messages[index].boilerplate:
            inside = (tokens.starts >= span.content + start) & (tokens.ends <= span.content + end)
            roles[inside & (turns == index) & (roles == span.role)] = Role.BOILERPLATE


def _ending(text: str) -> str:
    return repr(text[-40:])


def _cuts(text: str, begins: Iterable[str]) -> list[int]:
    """Where answers begin in the text, as generation began them."""
    return [len(begin) for begin in begins if text.startswith(begin)]


def _turn(text: str, index: int, until: str) -> int:
    """Where the turn of the answer at `index` is over; `until` is the conversation up to it."""
    if not text.startswith(until):
        raise UnstableTemplateError(
            f"the chat template changes what it wrote before when message {index + 2} follows, so "
            "generation would never see what training does. Split the conversation so that every answer is the "
            "last message of its row"
        )
    return len(until)


def _begins_otherwise(index: int, begin: str) -> str:
    return (
        f"the chat template begins the answer of message {index + 1} with {_ending(begin)} when it is to be "
        "generated, and writes something else when it is there, so generation would never see what training does. "
        "Set a variable of the template, as `data: {template_variables: {enable_thinking: true}}`, or give a "
        "template that does the same in both with `base: {template: FILE.jinja}`"
    )


def _after_prompt(
    messages: Sequence[Message], spans: Mapping[int, _Span], begin: str, text: str
) -> tuple[str, dict[int, _Span], set[int]]:
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
            raise DataError(_begins_otherwise(index, begin))
        rest = text[span.start :]
    else:
        raise DataError(_begins_otherwise(index, begin))
    shift = len(begin) + len(rest) - len(text)
    moved = dict(spans)
    if span is not None:
        moved[index] = replace(span, start=span.start + shift, end=span.end + shift, content=span.content + shift)
    return begin + rest, moved, inserted


def _lost(
    messages: Sequence[Message],
    tools: Sequence[Fields] = (),
    variables: Fields = NO_VARIABLES,
    form: "_Form | None" = None,
) -> Work[Lost]:
    """What the template does not write of these calls, thoughts and tools."""
    form = form or _Form(variables)
    if not needs_probe(messages, tools):
        return Lost()
    first = yield from _lost_of(form, probe(messages, tools, _free_characters(messages, tools), names=True))
    if first is not None and first.calls.keys() <= first.unnamed:
        return first
    # Perhaps it knows functions or arguments by their names.
    marked = probe(messages, tools, _free_characters(messages, tools), names=False)
    second = (yield from _lost_of(form, marked)) or marked.lost("")
    if first is None:
        return second
    left = {i: missing for i, missing in first.calls.items() if i in first.unnamed or i in second.calls}
    return replace(first, calls=left)


def _lost_of(form: "_Form", marked: Probe) -> Work[Lost | None]:
    """None where the template refuses the conversation with these marks."""
    chat = form.fields(marked.messages)
    try:
        (text,) = yield from _texts(form, chat, [(0, len(chat), False)], marked.tools)
    except DataError:
        return None
    return marked.lost(text)


def _check_written(
    form: "_Form", chat: Sequence[Fields], messages: Sequence[Message], tools: Sequence[Fields]
) -> Work[None]:
    """Raise DataError where the template does not write a message into a prompt. What it leaves out of earlier answers
    (their thoughts) is its own affair."""
    asked = [i for i, message in enumerate(messages) if message.role != "assistant" and message.content.strip()]
    marks = list(islice(_free_characters(messages, tools), 2 * len(asked)))
    around = [
        (i, *_core(messages[i].content), *pair)
        for i, pair in zip(asked, zip(marks[::2], marks[1::2], strict=True), strict=True)
    ]
    if not around:
        return
    (text,) = yield from _texts(form, chat, [(1, len(messages), True)], tools, around)
    for index, *_, before, after in around:
        if not all_in((before, after), text):
            raise DataError(
                f"the chat template drops message {index + 1} ({messages[index].role}): it has no place for it"
            )


def _check_calls(index: int, lost: Lost) -> None:
    """Raise DataError where the template does not write what the answer calls."""
    if index in lost.calls:
        raise DataError(
            f"the chat template drops {lost.calls[index]} in message {index + 1}: it has no place for it, and nobody "
            "would learn to make such a call. Give a template that has with `base: {template: FILE.jinja}`, or leave "
            "such conversations out"
        )


@dataclass(frozen=True)
class _Form:
    """A way to hand a conversation to a template. What one template can write another can only if it is put so."""

    variables: Fields
    """Those of the template that the conversation sets."""
    split: bool = False
    """Thoughts within the text of an answer are handed over apart from it."""
    text_arguments: bool = False
    """The arguments of a call are JSON in a text, in place of a mapping."""
    null_content: bool = False
    """A message with calls and no text has no content, in place of an empty one."""
    parts: bool = False
    """Content is a list of one part, in place of a text."""

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        return [_split(message) if self.split else message for message in messages]

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

    def check(self, message: Message, written: str) -> None:
        """Raise DataError where what the template wrote of a message with calls shows that it takes another form."""
        functions = [call["function"] for call in message.tool_calls]
        if self.text_arguments and not all(_json(function) in written for function in functions):
            raise DataError("the chat template does not write the JSON text of arguments as it is")
        if self.null_content and "None" in written and "None" not in f"{functions}{message.all_text}":
            raise DataError("the chat template writes None for a message without content")


def _json(function: Fields) -> str:
    return json.dumps(function["arguments"], ensure_ascii=False)


def _split(message: Message) -> Message:
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


def _alike(a: str, b: str) -> int:
    """How many characters the texts have in common at their beginning."""
    shorter = min(len(a), len(b))
    return next((place for place in range(shorter) if a[place] != b[place]), shorter)


def _core(text: str) -> tuple[int, int]:
    """Where the text begins and ends without the white space around it."""
    return len(text) - len(text.lstrip()), len(text.rstrip())


def _free_characters(messages: Sequence[Message], tools: Sequence[Fields] = ()) -> Iterator[str]:
    """Characters for private use that occur nowhere in the conversation (icon fonts use some of them)."""
    odd = [said for message in messages for said in (message.content, message.thinking) if not said.isascii()]
    others = [*(message.tool_calls for message in messages if message.tool_calls), *([tools] if tools else [])]
    odd += [json.dumps(other, ensure_ascii=False, default=str) for other in others]
    used = {character for text in odd for character in _PRIVATE.findall(text)}
    return (character for character in map(chr, PRIVATE) if character not in used)


def _remove_marks(marked: str, marks: str) -> tuple[str, list[list[int]]]:
    """The text without marks, and for each mark the places where it stood, in that text."""
    number = {mark: index for index, mark in enumerate(marks)}
    plain: list[str] = []
    places: list[list[int]] = [[] for _ in marks]
    length = 0
    for part in _PRIVATE.split(marked):  # every second one is a character of these planes
        if part in number:
            places[number[part]].append(length)
        else:
            plain.append(part)
            length += len(part)
    return "".join(plain), places
