"""FORMATS: row -> messages. A format is a function from a dict, as it stands in the file, to a list of messages.

The format of a file is detected from the keys of its first row and said aloud; `data.format` overrides it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graftlm.errors import nearest

Fields = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
TEXT = "text"
"""The role of the one message of a raw text row: it is not rendered by a chat template."""


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    tool_calls: tuple[Fields, ...] = ()
    """What an assistant asks of tools, as templates take it: {"type": "function", "function": {name, arguments}}."""
    thinking: str = ""
    """What an assistant thought before its answer (`reasoning_content`), for templates that have a place for it."""
    weight: float | None = None
    """The weight of its tokens in the loss in place of the mask's; None leaves it to the mask."""
    spans: tuple[tuple[int, int, float], ...] = ()
    """(start, end, weight): characters of `content` with a weight of their own."""


class RowError(ValueError):
    """What is wrong with one row; `source.py` adds where it stands."""


def prompt_completion(row: Fields) -> list[Message]:
    """{prompt, completion} or {prompt, response}, strings or lists of messages; `system` if there is one."""
    answer_key = "completion" if "completion" in row else "response"
    return [*_system(row), *_turn(row, "prompt", "user"), *_turn(row, answer_key, "assistant")]


def alpaca(row: Fields) -> list[Message]:
    """{instruction, input, output}: the input, where not empty, is a paragraph of its own below the instruction."""
    instruction, extra = _text(row, "instruction"), _text(row, "input", default="")
    question = f"{instruction}\n\n{extra}" if extra else instruction
    return [*_system(row), Message("user", question), Message("assistant", _text(row, "output"))]


def sharegpt(row: Fields) -> list[Message]:
    """{conversations: [{from, value}]}."""
    return [*_system(row), *_messages(row, "conversations", "from", "value", SHAREGPT_ROLES)]


def messages(row: Fields) -> list[Message]:
    """{messages: [{role, content}]}, as OpenAI has it."""
    return _messages(row, "messages", "role", "content", {role: role for role in ROLES})


def text(row: Fields) -> list[Message]:
    """{text}: raw text, every token of which the model should learn to write."""
    return [Message(TEXT, _text(row, "text"))]


FORMATS: dict[str, Callable[[Fields], list[Message]]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt-completion": prompt_completion,
    "text": text,
}

_SIGNS: dict[str, tuple[frozenset[str], ...]] = {
    "messages": (frozenset({"messages"}),),
    "sharegpt": (frozenset({"conversations"}),),
    "alpaca": (frozenset({"instruction", "output"}),),
    "prompt-completion": (frozenset({"prompt", "completion"}), frozenset({"prompt", "response"})),
    "text": (frozenset({"text"}),),
}


def detect(row: Fields) -> str:
    """The name of the format whose keys the row has; raises RowError that says what was found and what is known."""
    keys = set(row)
    for name, signs in _SIGNS.items():
        if any(sign <= keys for sign in signs):
            return name
    known = "; ".join(f"{name}: {', '.join(sorted(signs[0]))}" for name, signs in _SIGNS.items())
    raise RowError(f"fields {sorted(map(str, keys))} fit no known format. Known: {known}")


# Reading fields --------------------------------------------------------------------------------------------------


def _text(row: Fields, key: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if value is None and default is not None:
        return default
    if value is None:
        raise _missing(row, key)
    if not isinstance(value, str):
        raise RowError(f"field {key!r} must be text, this is a {type(value).__name__}: {value!r:.60}")
    return value


def _missing(row: Fields, key: str) -> RowError:
    found = "it is null" if key in row else f"found {sorted(map(str, row))}. {nearest(key, map(str, row))}"
    return RowError(f"field {key!r} is needed, {found}")


def _system(row: Fields) -> list[Message]:
    return [Message("system", _text(row, "system"))] if row.get("system") else []


def _turn(row: Fields, key: str, role: str) -> list[Message]:
    """A field that holds either the text of one message of this role, or whole messages."""
    if isinstance(row.get(key), list):
        return _messages(row, key, "role", "content", {role: role for role in ROLES})
    return [Message(role, _text(row, key))]


def _messages(row: Fields, key: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> list[Message]:
    turns = row.get(key)
    if turns is None:
        raise _missing(row, key)
    if not isinstance(turns, list) or not turns:
        raise RowError(f"field {key!r} must be a list of at least one message, this is {turns!r:.60}")
    found = []
    for index, turn in enumerate(turns):
        where = f"{key}[{index}]"
        if not isinstance(turn, Mapping):
            raise RowError(f"{where} must be a mapping with {role_key!r} and {text_key!r}, this is {turn!r:.60}")
        if turn.get("tool_calls"):
            raise RowError(f"{where} holds tool_calls, which this version does not render: leave such rows out")
        try:
            role = _text(turn, role_key)
            if role not in roles:
                raise RowError(f"{role_key} is {role!r}, which is no role. {nearest(role, roles)}")
            found.append(Message(roles[role], _text(turn, text_key)))
        except RowError as error:
            raise RowError(f"{where}: {error}") from None
    return found


def check(conversation: list[Message]) -> None:
    """Raise RowError for what no template could save: an empty answer, no answer, characters that are no text."""
    for index, message in enumerate(conversation):
        where = f"message {index + 1} ({message.role})"
        if "\0" in message.content:
            raise RowError(f"{where} contains a NUL character: clean the text")
        try:
            message.content.encode("utf-8")
        except UnicodeEncodeError as error:
            bad = message.content[error.start]
            raise RowError(
                f"{where} contains a lone surrogate ({bad!r} at character {error.start}): not valid text"
            ) from None
        if message.role in ("assistant", TEXT) and not message.content.strip():
            raise RowError(f"{where} is empty: there is nothing to learn from")
    if not any(m.role in ("assistant", TEXT) for m in conversation):
        raise RowError(f"no assistant message among {[m.role for m in conversation]}: there is nothing to learn from")
