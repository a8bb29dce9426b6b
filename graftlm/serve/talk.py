"""The core of all chat protocols: messages and tools in, pieces of answers out."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from graftlm.config.template_variables import check_variables
from graftlm.data.sources.messages import ROLES, Fields, Message, RowError, read_messages, read_tools
from graftlm.errors import nearest
from graftlm.generation.grammar import Grammar
from graftlm.generation.logprobs import TokenLogprob
from graftlm.generation.requests import Ids
from graftlm.serve.catalog import Opened
from graftlm.serve.dialect import Part, Parts
from graftlm.serve.errors import invalid, object_of
from graftlm.serve.limits import unknown_field
from graftlm.serve.runs import Run, Service, Wanted
from graftlm.tool_calls.plain import said_plainly

MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")


@dataclass(frozen=True)
class Talk:
    """What a chat request wants, in whichever protocol it came."""

    wanted: Wanted
    messages: Sequence[Message]
    tools: Sequence[Fields] = ()
    variables: Fields = field(default_factory=dict)
    """Of the chat template."""
    optional_variables: Fields = field(default_factory=dict)
    """Those that are set where the template reads them."""

    @property
    def schemas(self) -> dict[str, Any]:
        """Name of a tool -> the schema of its arguments."""
        return {tool["function"]["name"]: tool["function"].get("parameters") for tool in self.tools}

    def render(self, opened: Opened) -> list[Ids]:
        """The prompt. ApiError for variables that the chat template does not read."""
        if unread := opened.renderer.unread(self.variables):
            raise invalid(f"the chat template of this model does not read {unread[0]!r}", unread[0], "unknown_variable")
        unread = opened.renderer.unread(self.optional_variables)
        read = {name: value for name, value in self.optional_variables.items() if name not in unread}
        messages, tools = self.messages, self.tools
        if tools and opened.renderer.unread({"tools": None}):
            messages, tools = said_plainly(messages, tools), ()
        return [opened.renderer.prompt_of_strangers(messages, tools, {**self.variables, **read})]


class Piece(NamedTuple):
    """A part of one answer, the tokens of a step, or why it ended."""

    number: int
    """Of the answer, from 0."""
    part: Part = Part()
    tokens: Sequence[int] = ()
    """The ids that the step brought, with the first piece of it."""
    logprobs: Sequence[TokenLogprob] = ()
    """Of these tokens, where they are wanted."""
    finish: str | None = None
    """OpenAI's word: stop, length or tool_calls."""
    stopped: str | None = None
    """The text of `stop` that ended it."""


@dataclass
class Answer:
    """One complete answer."""

    text: str = ""
    thought: str = ""
    calls: list[Mapping[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = ""
    stopped: str | None = None


def messages_of(trees: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as OpenAI has them. ApiError (400) for anything that would be lost, and for an answer at the end."""
    for number, tree in enumerate(trees):
        where = f"messages[{number}]."
        given = {name: value for name, value in tree.items() if value not in (None, [], {})}
        if unknown := [name for name in given if name not in MESSAGE_FIELDS]:
            raise unknown_field(unknown[0], MESSAGE_FIELDS, where)
        _check_content(tree.get("content"), f"{where}content")
    try:
        found = read_messages({"messages": list(trees)}, "messages", ROLES)
    except RowError as error:
        raise invalid(str(error), "messages") from None
    if found[-1].role == "assistant":
        raise invalid(
            "the last message is the assistant's, and an answer that goes on from it is not supported. End with a "
            "message of the user or of a tool",
            "messages",
        )
    return found


def text_of(content: Any, where: str, kinds: Sequence[str] = ("text",), *, part: str = "part") -> str:
    """The text of content that is a string, or a list of parts of these types. ApiError (400) for any other part."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{where} must be text or a list of {part}s", where)
    found = []
    for each in content:
        kind = each.get("type") if isinstance(each, Mapping) else type(each).__name__
        if not isinstance(each, Mapping) or kind not in kinds or not isinstance(each.get("text"), str):
            raise invalid(f"{where} has a {part} of the type {kind!r:.60}: this server reads text alone", where)
        found.append(each["text"])
    return "".join(found)


def _check_content(content: Any, where: str) -> None:
    """Parts of content are text, and nothing else is."""
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise invalid(f"{where} has a part of the type {kind!r}: this server reads text alone", where)


def tools_of(trees: Sequence[Mapping[str, Any]] | None) -> tuple[Fields, ...]:
    """Tools as OpenAI has them: {type: function, function: {name, description, parameters}}."""
    for number, tree in enumerate(trees or ()):
        if tree.get("type", "function") != "function":
            raise invalid(f"tools[{number}].type must be 'function', this is {tree['type']!r:.60}", "tools")
    try:
        found = read_tools({"tools": list(trees)} if trees else {})
    except RowError as error:
        raise invalid(str(error), "tools") from None
    names = [tool["function"]["name"] for tool in found]
    if len(set(names)) < len(names):
        raise invalid("two tools have the same name", "tools")
    return found


def variables_of(kwargs: Mapping[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """Variables of the chat template that a request sets."""
    variables = dict(kwargs or {}) | ({} if effort is None else {"reasoning_effort": effort})
    try:
        check_variables(variables)
    except ValueError as error:
        raise invalid(str(error), "chat_template_kwargs") from None
    return variables


def forced_call(choice: Any, tools: Sequence[Fields], *, parallel: bool) -> Callable[[Opened], Grammar] | None:
    """The grammar that `tool_choice` asks for: None for auto and none. A named tool is called once, and without
    `parallel` one tool is. ApiError for what it cannot be."""
    name = None
    if isinstance(choice, Mapping):
        name = named_tool((object_of(choice.get("function"), "tool_choice.function") or choice).get("name"), tools)
    elif choice in (None, "none", "auto"):
        return None
    elif choice != "required":
        raise invalid(f"tool_choice is {choice!r:.60}. {nearest(choice, ['none', 'auto', 'required'])}", "tool_choice")
    elif not tools:
        raise invalid("tool_choice is 'required', and there are no tools", "tool_choice")
    several = parallel and name is None
    return lambda opened: opened.rendering.dialect.forced(tools, name, opened.renderer, parallel=several)


def grammar_for(
    form: Grammar | None,
    choice: Any,
    tools: Sequence[Fields],
    *,
    field: str = "response_format",
    parallel: bool = True,
) -> Callable[[Opened], Grammar] | None:
    """What an answer must be: of the format that is wanted, or a call."""
    forced = forced_call(choice, tools, parallel=parallel)
    if form is None:
        return forced
    if forced is not None:
        raise invalid(f"{field} and tool_choice want different answers: leave one of them out", field)
    return lambda _: form


def named_tool(name: Any, tools: Sequence[Fields]) -> str:
    """The name, where a tool has it."""
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        raise invalid(f"tool_choice names {name!r:.60}, which is no tool. {nearest(str(name), names)}", "tool_choice")
    return str(name)


async def begin(service: Service, talk: Talk) -> Run:
    """Begin to answer. ApiError for what cannot be."""
    return await service.run(talk.wanted, talk.render)


async def pieces(run: Run, talk: Talk | None = None) -> AsyncIterator[Piece]:
    """The answers of a run, piece by piece; those of a `talk` without their thoughts and calls in the text."""
    parts = [_parts(run, talk, number) for number in range(run.count)] if talk is not None else []
    called = [False] * run.count
    async for update in run.updates():
        number, split = update.number, parts[update.number] if parts else None
        found = ([Part(text=update.text)] if split is None else split.add(update.text)) if update.text else []
        if update.finish is not None and split is not None:
            found += split.close()
        called[number] = called[number] or any(part.call is not None for part in found)
        if found or update.tokens:
            first, *rest = found or [Part()]
            yield Piece(number, first, update.tokens, update.logprobs)
            for part in rest:
                yield Piece(number, part)
        if update.finish is not None:
            finish = "tool_calls" if called[number] and update.finish == "stop" else update.finish
            yield Piece(number, finish=finish, stopped=update.stopped)


def _parts(run: Run, talk: Talk, number: int) -> Parts:
    rendering, prompt = run.opened.rendering, run.prompts[number // run.wanted.n]
    # what must be JSON has no thoughts before it
    return Parts(rendering.dialect, rendering.renderer, prompt, talk.schemas, plain=run.wanted.grammar is not None)


async def collect(run: Run, talk: Talk | None = None) -> list[Answer]:
    """The complete answers of a run."""
    answers = [Answer() for _ in range(run.count)]
    async for piece in pieces(run, talk):
        answer = answers[piece.number]
        answer.text += piece.part.text
        answer.thought += piece.part.thought
        answer.tokens += piece.tokens
        answer.logprobs += piece.logprobs
        if piece.finish is not None:
            answer.finish, answer.stopped = piece.finish, piece.stopped
        if piece.part.call is not None:
            answer.calls.append(piece.part.call)
    return answers
