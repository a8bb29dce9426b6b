"""Messages -> (ids, role of every token), in one pass, by the tokenizer's own chat template.

Training, evaluation and generation all come through here, so what training feeds is what generation feeds.

The template is run once plainly and once with marks around each message (`spans.py`); the tokens of the text know their
characters (`tokenization.py`), and so their roles (`token_roles.py`). No marker string is searched and no token id is
looked for.

An answer begins where generation would begin it: where the text of the prompt ends. What the template writes between
that place and the answer's own text (a space, an empty block of thoughts) the model has to write by itself, so it
belongs to the answer.
"""

import copy
import datetime
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.config.template_variables import names_in
from graftlm.data.chat.forms import Form, forms_of
from graftlm.data.chat.literal import marked_fields, with_marks, without_mark
from graftlm.data.chat.lost import NO_VARIABLES, check_calls, check_prompt, find_lost
from graftlm.data.chat.requests import T, Work, run_all, texts_of
from graftlm.data.chat.roles import Rendered, Role
from graftlm.data.chat.spans import (
    UnstableTemplateError,
    after_prompt,
    answer_starts,
    find_spans,
    free_characters,
    prompt_mismatch,
    turn_end,
)
from graftlm.data.chat.template import ChatTemplate
from graftlm.data.chat.token_roles import TokenRoles, row_weights, set_boilerplate
from graftlm.data.chat.tokenization import Tokenization
from graftlm.data.chat.turn_order import TurnOrder, without_system
from graftlm.data.chat.written import LostPart
from graftlm.data.sources.formats import TEXT, Fields, Message
from graftlm.errors import DataError

Asked = tuple[Sequence[Message], Sequence[Fields]] | tuple[Sequence[Message], Sequence[Fields], Fields]
"""A conversation: messages, tools and, where it sets any, variables of the template."""

Rows = list[Rendered] | DataError


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
        self.tokenization = Tokenization(tokenizer)
        self.tokenizer = tokenizer
        self._token_roles = TokenRoles(self.tokenization)
        own = tokenizer.chat_template  # text, or for a few tokenizers several templates by name
        own = own.get("default") if isinstance(own, dict) else own
        self.template = template if template is not None else own
        variables = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        self.today = today or datetime.date.today()
        self.turn_order = turn_order
        self._chat = None if self.template is None else ChatTemplate(self.template, variables, self.today)
        self._names = names_in(self.template or "")
        self._knows_thoughts = "reasoning_content" in (self.template or "")

    def for_rows(self) -> "Renderer":
        """A copy that renders rows and no more. It is quick to send to another process, which need not import
        transformers for it."""
        own = copy.copy(self)
        own.__dict__.update(tokenizer=None, tokenization=self.tokenization.for_rows())
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
        """The variables that the template does not read."""
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

    def prompt_of_strangers(
        self, messages: Sequence[Message], tools: Sequence[Fields] = (), variables: Fields = NO_VARIABLES
    ) -> NDArray[np.int32]:
        """As `prompt`, for messages that nobody has looked at: what they say is text. A message that holds the text of
        a control token (`<|im_end|>`) cannot end its turn by it, as that text has the ids of its letters.

        Control tokens are the special ones, and those that the template writes itself; of the second kind, answers may
        hold some (`<think>`), as the model wrote them.
        """
        special = frozenset(self.tokenization.special_texts)
        written = {text for text in self.tokenization.control_texts if text in (self.template or "")}
        mark = next(iter(free_characters(messages, tools)))
        safe = [with_marks(m, mark, special if m.role == "assistant" else special | written) for m in messages]
        shown = [marked_fields(tool, mark, special | written) for tool in tools]
        values = marked_fields(variables, mark, special | written)
        return self._alone(self._prompt(safe, shown, values, mark))

    def prompts_of_all(self, conversations: Sequence[Asked]) -> list[NDArray[np.int32] | DataError]:
        """What `prompt` returns for each of many conversations, or the DataError that it raises."""
        return self._together([self._prompt(*conversation) for conversation in conversations])

    def lost_of_all(self, conversations: Sequence[Asked]) -> list[LostPart | DataError]:
        """For each conversation the parts that the template does not write, or the DataError that it raises."""
        return self._together([find_lost(*conversation) for conversation in conversations])

    # Rendering is written for one conversation and done for many: each is a generator that yields what it wants to know
    # of the template or of the tokenizer, and is sent the answer.

    def _alone(self, work: Work[T]) -> T:
        (found,) = self._together([work])
        if isinstance(found, DataError):
            raise found
        return found

    def _together(self, works: Sequence[Work[T]]) -> list[T | DataError]:
        return run_all(works, self._chat)

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
                    "--turn-order of graft chat) puts it before the first question, drop leaves it out",
                    code=error.slug,
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
            raise DataError(
                "the conversation begins with an answer, and to what? Begin the row with a user message",
                code="answer-without-question",
            )

        def rendered(form: Form) -> Work[tuple[Rendered, bool]]:
            return self._rendered_as(form, messages, tools, answers)

        return (yield from self._in_a_form(messages, variables, rendered))

    def _in_a_form(
        self, messages: Sequence[Message], variables: Fields, attempt: Callable[[Form], Work[tuple[T, bool]]]
    ) -> Work[T]:
        """What `attempt` finds in the first form of the messages of which the template loses nothing; else in the first
        one that it can render. Raises the DataError of the first form where it can render none."""
        found: list[T] = []
        errors: list[DataError] = []
        for form in forms_of(messages, variables, knows_thoughts=self._knows_thoughts):
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

    def _rendered_as(
        self, form: Form, messages: Sequence[Message], tools: Sequence[Fields], answers: Sequence[int]
    ) -> Work[tuple[Rendered, bool]]:
        """The row, and whether nothing is lost that another form may save."""
        own, messages = messages, form.messages(messages)
        marked = [i for i, m in enumerate(messages) if m.content.strip() and (m.role != "assistant" or i in answers)]
        marks = "".join(islice(free_characters(messages, tools), 2 * len(messages)))
        count = len(messages)
        assistant_turns = [i for i, m in enumerate(messages) if m.role == "assistant" and i > 0]
        asks = [(0, count, False), (1, count, False), *((0, i, True) for i in assistant_turns)]
        asks += [(0, i + 1, False) for i in answers]
        chat = form.fields(messages)
        around = [(i, 0, len(messages[i].content), marks[2 * i], marks[2 * i + 1]) for i in marked]
        if not around:  # nothing to look for
            asks[1] = asks[0]
        text, outside, *prefixes = yield from texts_of(form, chat, asks, tools, around)
        begins = dict(zip(assistant_turns, prefixes, strict=False))
        spans = yield from find_spans(form, messages, tools, marked, marks, text, outside)
        untils = zip(answers, prefixes[len(assistant_turns) :], strict=True)
        turns = {i: turn_end(text, i, until) for i, until in untils}
        other = [i for i in answers if not text.startswith(begins[i])]
        inserted: set[int] = set()
        if other and answers == [count - 1]:
            text, spans, inserted = after_prompt(messages, spans, begins[count - 1], text)
            turns = {count - 1: len(text)}
        elif other:
            raise UnstableTemplateError(prompt_mismatch(other[0], begins[other[0]]), code="prompt-mismatch")
        lost = yield from find_lost(messages, tools, form=form)
        for i, until in turns.items():
            check_calls(i, lost)
            form.check(messages[i], text[len(begins[i]) : until])
        bounds = {i: (len(begins[i]), until) for i, until in turns.items()}
        tokens = self.tokenization.encode(text, cuts=answer_starts(text, begins.values()))
        roles, turn_of = self._token_roles.of(messages, spans, bounds, tokens, len(text))
        set_boilerplate(messages, spans, roles, turn_of, tokens)
        own_weights = row_weights(messages, spans, roles, turn_of, tokens.starts)
        thoughts = {i for i in lost.thoughts - inserted if i in answers and messages[i].weight != 0}
        row = Rendered(
            tokens.ids, roles, text, turn_of, own_weights, lost_thoughts=bool(thoughts), lost_tools=lost.tools
        )
        return row, not lost.calls and not any(messages[i] is not own[i] for i in thoughts)

    def _prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Fields] = (),
        variables: Fields = NO_VARIABLES,
        mark: str = "",
    ) -> Work[NDArray[np.int32]]:
        def prompted(messages: Sequence[Message]) -> Work[NDArray[np.int32]]:
            return self._in_a_form(messages, variables, lambda form: self._prompt_as(form, messages, tools, mark))

        return (yield from self._with_system(messages, prompted))[0]

    def _prompt_as(
        self, form: Form, messages: Sequence[Message], tools: Sequence[Fields], mark: str
    ) -> Work[tuple[NDArray[np.int32], bool]]:
        """The ids, and whether nothing is lost that another form may save. No token lies across a `mark`."""
        own, messages = messages, form.messages(messages)
        assistant_turns = [i for i, m in enumerate(messages) if m.role == "assistant" and i > 0]
        chat = form.fields(messages)
        text, *begins = yield from texts_of(
            form, chat, [(0, i, True) for i in (len(messages), *assistant_turns)], tools
        )
        yield from check_prompt(form, chat, messages, tools)
        lost = yield from find_lost(messages, form=form)
        for message in messages:
            form.check(message, text)
        whole = not lost.calls and not any(messages[i] is not own[i] for i in lost.thoughts)
        plain, cuts = without_mark(text, mark)
        starts = answer_starts(plain, [without_mark(begin, mark)[0] for begin in begins])
        return self.tokenization.encode(plain, cuts=[*starts, *cuts]).ids, whole

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: what training trains as the end of a turn is what generation stops at."""
        probe = [Message("user", "a"), Message("assistant", "b")]
        eos = self.tokenization.end_ids
        if self.template is None:
            return tuple(eos)
        try:
            rendered = self.conversation(probe)
        except DataError:  # nothing can be trained with such a template, but the base can be talked to
            return tuple(eos)
        ends = rendered.ids[rendered.roles == Role.END_OF_TURN].tolist()
        return tuple(dict.fromkeys([*(i for i in ends if i in self.tokenization.control), *eos]))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and without tidying up."""
        return self.tokenization.decode(ids)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, special tokens included. Of a character that several tokens make, the first has all of
        it and the others have none."""
        return self.tokenization.token_texts(ids)

    def _raw(self, message: Message) -> Rendered:
        """Raw text between the tokenizer's begin and end tokens, where it has them; all of it is to be learnt."""
        ids, starts, _, _ = self.tokenization.encode(message.content, cuts=[])
        begin, end = self.tokenization.begin_ids, self.tokenization.end_ids
        parts = ((begin, Role.SPECIAL), (ids, Role.ASSISTANT), (end, Role.END_OF_TURN))
        roles = np.concatenate([np.full(len(part), role, np.uint8) for part, role in parts])
        own_weights = np.full(len(roles), np.nan if message.weight is None else message.weight, np.float32)
        for start, stop, weight in message.spans:
            at = np.flatnonzero((starts >= start) & (starts < stop))
            own_weights[len(begin) + at] = weight
        return Rendered(
            np.concatenate([np.array(part, np.int32) for part, _ in parts]),
            roles,
            message.content,
            np.zeros(len(roles), np.int32),
            own_weights,
        )
