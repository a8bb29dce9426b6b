"""Messages as they stand in a row -> Message: the roles, tool calls, thoughts and weights that others' files have.

Every function here takes fields and raises RowError, which names the field, what was found and what is near.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from graftlm.data.sources.fields import Tracked, read_all, tracked
from graftlm.errors import nearest

Fields = Mapping[str, Any]

CALL = "call"
"""The role of a ShareGPT turn whose whole text is the JSON of tool calls (`function_call`)."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""OpenAI's roles, and ours."""
SHAREGPT_ROLES = ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": CALL,
}
PAIRS = (("human", "user", "tool"), ("assistant", "gpt", "bot"))
"""Keys of a turn that holds both what was asked and what was answered."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of the thoughts before an answer: of OpenAI-compatible servers, of vLLM and OpenRouter, of templates."""
TRAIN_FLAGS = ("train", "trainable", "training", "train_on_turn", "loss_mask")
"""Keys of a message that say whether it is trained: true or false, 1 or 0."""
_FLAGS = frozenset(TRAIN_FLAGS)
MEDIA = frozenset(
    f"{kind}{end}"
    for kind in ("image", "video", "audio")
    for end in ("", "s", "_path", "_paths", "_url", "_urls", "_file", "_files")
)
"""Keys of a row, of a message or of a part of it that hold what is not text."""
MESSAGE_KEYS = (
    *("role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "name"),
    *(*THOUGHTS, *TRAIN_FLAGS, "weight", "loss", "loss_scale", "spans", "boilerplate"),
)
"""Keys that are read in a message of the role that they belong to."""
TEXT = "text"
"""The role of the one message of a raw text row: it is not rendered by a chat template."""


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    tool_calls: tuple[Fields, ...] = ()
    """Calls of tools by an assistant, as templates take them: {"type": "function", "function": {name, arguments}}."""
    thinking: str = ""
    """What an assistant thought before its answer (`reasoning_content`), for templates that have a place for it."""
    weight: float | None = None
    """The weight of its tokens in the loss in place of the mask's; None leaves it to the mask."""
    spans: tuple[tuple[int, int, float], ...] = ()
    """(start, end, weight): characters of `content` with a weight of their own."""
    call_id: str = ""
    """In a tool's message the `id` of the call that it answers, which some templates write."""
    name: str = ""
    """In a tool's message the name of the tool."""
    boilerplate: tuple[tuple[int, int], ...] = ()
    """(start, end): characters of `content` that are fixed words of a template; only the mask `everything` trains
    them."""

    @property
    def all_text(self) -> str:
        """All that it says: thoughts, text, and calls of tools as JSON."""
        calls = [json.dumps(call["function"], sort_keys=True, default=str) for call in self.tool_calls]
        return "\n".join(part for part in (self.thinking, self.content, *calls) if part)


class RowError(ValueError):
    """An error in one row; `source.py` adds its file and line."""


# Fields ------------------------------------------------------------------------------------------------------------


def read_text(row: Fields, key: str, default: str | None = None) -> str:
    """The text in a field; where there is a default it may be missing or null."""
    value = row.get(key, default)
    if value is None and default is not None:
        return default
    if value is None:
        raise missing(row, key)
    if not isinstance(value, str):
        raise RowError(f"field {key!r} must be text, this is a {type(value).__name__}: {value!r:.60}")
    return value


def read_number(row: Fields, key: str) -> float:
    """The finite number in a field; a .csv file has it as text."""
    value = row.get(key)
    if value is None:
        raise missing(row, key)
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    raise RowError(f"field {key!r} must be a number, this is {value!r:.60}")


def missing(row: Fields, key: str) -> RowError:
    found = "it is null" if key in row else f"found {sorted(map(str, row))}. {nearest(key, map(str, row))}"
    return RowError(f"field {key!r} is needed, {found}")


def from_json(row: Fields, key: str) -> Any:
    """The value of a field that cannot be text. JSON of a list or mapping is read: a .csv file has nothing else."""
    value = row.get(key)
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        value = _loaded(value, f"field {key!r}")
    except RowError as error:
        python = value.lstrip("[ {\n").startswith("'")
        hint = ". This is how Python shows a value: write it with json.dumps" if python else ""
        raise RowError(f"{error}{hint}") from None
    if isinstance(row, Tracked):
        row[key] = value = tracked(value)
    return value


def listed(row: Fields, key: str, what: str = "entry") -> list[Any]:
    """The list in a field, of at least one thing."""
    value = from_json(row, key)
    if value is None:
        raise missing(row, key)
    if not isinstance(value, list) or not value:
        raise RowError(f"field {key!r} must be a list of at least one {what}, this is {value!r:.60}")
    return value


# Messages ----------------------------------------------------------------------------------------------------------


def read_messages(row: Fields, key: str, roles: Mapping[str, str]) -> list[Message]:
    """The messages in a list of turns; turns are {role, content}, {from, value} or {human, assistant}."""
    found: list[Message] = []
    calls: set[str] = set()
    for index, turn in enumerate(listed(row, key, "message")):
        try:
            if not isinstance(turn, Mapping):
                names = "'from' and 'value'" if roles is SHAREGPT_ROLES else "'role' and 'content'"
                raise RowError(f"a message must be a mapping with {names}, this is {turn!r:.60}")
            refuse_media(turn)
            found += _turn(turn, roles)
            call_id = turn.get("tool_call_id")
            if found[-1].role == "tool" and calls and call_id is not None and call_id not in calls:
                near = nearest(str(call_id), calls)
                raise RowError(f"tool_call_id {call_id!r} is no call that was made before. {near}")
            calls |= {str(call["id"]) for call in found[-1].tool_calls if "id" in call}
        except RowError as error:
            raise RowError(f"{key}[{index}]: {error}") from None
    return found


def refuse_media(fields: Fields) -> None:
    """Raise RowError where pictures, videos or sounds stand beside the text."""
    if MEDIA.isdisjoint(fields):
        return
    if media_keys := [key for key in fields if key in MEDIA and fields.get(key)]:
        kind = f"{media_keys[0].partition('_')[0].removesuffix('s')}s"
        raise RowError(f"field {media_keys[0]!r} holds {kind}: only text can be trained on")


def _turn(turn: Fields, roles: Mapping[str, str]) -> Iterator[Message]:
    if roles is SHAREGPT_ROLES and "role" not in turn:
        question_key, answer_key = (next((key for key in keys if key in turn), None) for keys in PAIRS)
        if "from" not in turn and question_key and answer_key:
            yield Message("tool" if question_key == "tool" else "user", read_text(turn, question_key))
            yield Message("assistant", read_text(turn, answer_key))
            return
        role_key, text_key = "from", "value"
    else:
        role_key, text_key = "role", "value" if "value" in turn and "content" not in turn else "content"
    name_of_role = read_text(turn, role_key)
    if name_of_role not in roles:
        plain = name_of_role.strip().lower()
        near = f"Did you mean {plain!r}?" if plain in roles else nearest(name_of_role, roles)
        raise RowError(f"{role_key} is {name_of_role!r}, which is no role. {near}")
    if roles[name_of_role] == CALL:
        calls = _calls(_loaded(read_text(turn, text_key), text_key))
        yield Message("assistant", "", calls, _thoughts(turn), _weight(turn, "assistant"))
        return
    yield _message(turn, roles[name_of_role], text_key)


def _message(turn: Fields, role: str, text_key: str) -> Message:
    calls: tuple[dict[str, Any], ...] = ()
    for key in ("tool_calls", "function_call"):  # the second is OpenAI's older way
        if not calls and turn.get(key):
            calls = _calls(from_json(turn, key))
    if calls and role != "assistant":
        raise RowError(f"tool_calls in a message of the role {role!r}: only an assistant calls tools")
    content, spans = _content(turn, text_key, needed=not calls)
    if turn.get("spans"):
        spans = read_spans(turn["spans"], len(content))
    thinking = _thoughts(turn) if role == "assistant" else ""
    call_id, name = (
        "" if role != "tool" or turn.get(key) is None else str(turn[key]) for key in ("tool_call_id", "name")
    )
    fixed = _boilerplate(turn, len(content))
    return Message(role, content, calls, thinking, _weight(turn, role), spans, call_id, name, fixed)


def _thoughts(turn: Fields) -> str:
    """The thoughts, under any of their names; RowError where two names have different ones."""
    found = {key: text for key in THOUGHTS if (text := read_text(turn, key, default=""))}
    if len(set(found.values())) > 1:
        raise RowError(f"fields {' and '.join(map(repr, found))} hold different thoughts: leave one of them")
    return next(iter(found.values()), "")


def _content(turn: Fields, key: str, *, needed: bool) -> tuple[str, tuple[tuple[int, int, float], ...]]:
    """The text, which may come in parts that are put end to end; a part with a `train` of its own is a span."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return read_text(turn, key, default=None if needed else ""), ()
    text, spans = "", []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowError(f"{key} holds a part of the type {kind!r}: only text can be trained on")
        refuse_media(part)
        start, text = len(text), text + read_text(part, "text")
        if part.get("train") is not None:
            if not isinstance(part["train"], bool):
                raise RowError(f"'train' of a part of {key} must be true or false, this is {part['train']!r:.60}")
            spans.append((start, len(text), float(part["train"])))
    return text, tuple(spans)


def _boilerplate(turn: Fields, length: int) -> tuple[tuple[int, int], ...]:
    """[[start, end], ...]: the fixed words of a template in a text of this length."""
    if not turn.get("boilerplate"):
        return ()
    found = [[*one, 0] if isinstance(one, list) else one for one in listed(turn, "boilerplate", "[start, end]")]
    return tuple((start, end) for start, end, _ in read_spans(found, length))


def read_spans(spans: Any, length: int) -> tuple[tuple[int, int, float], ...]:
    """[[start, end, weight], ...] in order, within a text of this length and not across each other."""
    found: list[tuple[int, int, float]] = []
    for span in spans if isinstance(spans, list) else [spans]:
        whole = isinstance(span, list | tuple) and len(span) == 3
        if not whole or not all(isinstance(place, int) and not isinstance(place, bool) for place in span[:2]):
            raise RowError(f"a span must be [start, end, weight], this is {span!r:.60}")
        start, end, weight = span
        if not (found[-1][1] if found else 0) <= start <= end <= length:
            raise RowError(f"span {span!r} is out of order or outside the text, which has {length} characters")
        found.append((start, end, _number(weight, "the weight of a span", most=math.inf)))
    return tuple(found)


def _weight(turn: Fields, role: str) -> float | None:
    """The weight of a message, the product of all keys that give one: OpenAI's `weight`, 0 to 1; the TRAIN_FLAGS of
    Axolotl, LLaMA-Factory, verl and others; and, for answers only, ms-swift's `loss` and `loss_scale`."""
    found: list[float] = []
    if turn.get("weight") is not None:
        found.append(_number(turn["weight"], "weight", most=1))
    for key in () if _FLAGS.isdisjoint(turn) else TRAIN_FLAGS:
        if (flag := turn.get(key)) is not None:
            if flag not in (0, 1) or isinstance(flag, float):  # False and True are 0 and 1
                raise RowError(f"{key} must be true or false (1 or 0), this is {flag!r:.60}")
            found.append(float(flag))
    if role == "assistant":
        loss = turn.get("loss")
        if loss is not None:
            if not isinstance(loss, bool):
                raise RowError(f"loss must be true or false, this is {loss!r:.60}")
            found.append(float(loss))
        if turn.get("loss_scale") is not None:
            found.append(_number(turn["loss_scale"], "loss_scale", most=math.inf))
    return math.prod(found) if found else None


def _number(value: Any, what: str, *, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"{what} must be a number, this is {value!r:.60}")
    if not 0 <= value <= most or math.isinf(value):
        raise RowError(f"{what} is {value!r}, out of range: it must be from 0 to {most:g}")
    return float(value)


# Tools -------------------------------------------------------------------------------------------------------------


def read_tools(row: Fields) -> tuple[dict[str, Any], ...]:
    """The field `tools`: a list of functions, or its JSON; bare functions are put into OpenAI's {type, function}."""
    tools = row.get("tools")
    if tools is None or tools == "":
        return ()
    tools = _loaded(tools, "tools") if isinstance(tools, str) else tools
    found = [_function(tool, f"tools[{i}]") for i, tool in enumerate(_several(tools, "tools"))]
    return tuple({**entry, "function": read_all(function)} for entry, function in found)


def _calls(calls: Any) -> tuple[dict[str, Any], ...]:
    found = []
    for index, call in enumerate(_several(calls, "tool_calls")):
        where = f"tool_calls[{index}]"
        entry, function = _function(call, where)
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # OpenAI has them as JSON in a text, templates take the mapping
            arguments = _loaded(arguments, f"{where}: arguments") if arguments.strip() else None
        arguments = {} if arguments is None else arguments  # null and "null" are a call without arguments
        if not isinstance(arguments, Mapping):
            raise RowError(f"{where}: arguments must be a mapping or its JSON, this is {arguments!r:.60}")
        found.append({**entry, "function": {"name": function["name"], "arguments": read_all(arguments)}})
    return tuple(found)


def _function(entry: Any, where: str) -> tuple[dict[str, Any], Fields]:
    """(the entry as OpenAI has it: {type, function, ...}; its function, which has a name)"""
    if not isinstance(entry, Mapping):
        raise RowError(f"{where} must be a mapping, this is {entry!r:.60}")
    function = entry.get("function", entry)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError(f"{where} names no function: {function!r:.60}")
    whole = read_all(entry) if "function" in entry else {"function": function}
    return {"type": "function", **whole}, function


def _several(value: Any, what: str) -> list[Any]:
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, list):
        raise RowError(f"{what} must be a list, this is {value!r:.60}")
    return value


def _loaded(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not valid JSON ({error}): {text!r:.60}") from None
