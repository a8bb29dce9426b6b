"""The formats in which families of models write calls, how a chat template names its own, and calls out of a text.

Tags may be special tokens, so the text must be one that keeps those (`TextStream`, `keep_special`).
"""

import re
from typing import NamedTuple

from graftlm.data.sources.messages import Fields
from graftlm.generation.text_stream import may_become
from graftlm.tool_calls import readers
from graftlm.tool_calls.readers import PYTHON_TAG, SEPARATOR, Reader, Tools, json_calls, python_list, tagged
from graftlm.tool_calls.values import QUOTE


class ToolFormat(NamedTuple):
    """How a family writes calls."""

    name: str
    begins: tuple[str, ...]
    """What a call begins with."""
    read: Reader
    alone: bool = False
    """Whether a call is a whole answer, so that it begins where the answer does."""
    tags: tuple[str, ...] = ()
    """What may be special tokens, beside `begins`."""

    @property
    def kept(self) -> tuple[str, ...]:
        """Special tokens that are a part of the text."""
        return (*self.begins, *self.tags)


def _between(name: str, open_: str, close: str, inside: readers.Inside, *tags: str) -> ToolFormat:
    return ToolFormat(name, (open_,), tagged(open_, close, inside), tags=(close, *tags))


HERMES = _between("hermes", "<tool_call>", "</tool_call>", json_calls())
"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>, one after the other: Hermes, Qwen, SmolLM3, Granite 4."""
XML = _between("xml", "<tool_call>", "</tool_call>", readers.xml_calls)
"""<tool_call><function=NAME><parameter=KEY>raw</parameter></function></tool_call>: Qwen3-Coder, Qwen3.5, Nemotron 3."""
GLM = _between("glm", "<tool_call>", "</tool_call>", readers.glm_calls)
"""<tool_call>NAME<arg_key>KEY</arg_key><arg_value>raw</arg_value></tool_call>: GLM 4.5 and later."""
GRANITE = _between("granite", "<|tool_call|>", "<|/tool_call|>", json_calls())
"""<|tool_call|>[{"name": ..., "arguments": {...}}, ...]: Granite 3, and with <|/tool_call|> Phi-4-mini."""
LFM = _between("lfm", "<|tool_call_start|>", "<|tool_call_end|>", python_list("<|tool_call_end|>"))
"""<|tool_call_start|>[f(a=1), g()]<|tool_call_end|>: LFM2."""
GEMMA = _between("gemma", "<|tool_call>", "<tool_call|>", readers.gemma_calls, QUOTE)
"""<|tool_call>call:NAME{key:<|"|>text<|"|>,n:7}<tool_call|>: Gemma 4."""
COHERE = _between("cohere", "<|START_ACTION|>", "<|END_ACTION|>", json_calls("tool_name", "parameters", "tool_call_id"))
"""<|START_ACTION|>[{"tool_call_id": "0", "tool_name": ..., "parameters": {...}}]<|END_ACTION|>: Command R7B, A."""


def _in_section(name: str, tags: tuple[str, str, str, str], inside: readers.Inside, *more: str) -> ToolFormat:
    """Calls between tags, and two other tags around all of them."""
    begins, begin, end, ends = tags
    return ToolFormat(name, (begins, begin), tagged(begin, end, inside, around=(begins, ends)), tags=(end, ends, *more))


_CALL = "<\uff5ctool\u2581call\u2581begin\uff5c>"
_DEEPSEEK = (
    "<\uff5ctool\u2581calls\u2581begin\uff5c>",
    _CALL,
    "<\uff5ctool\u2581call\u2581end\uff5c>",
    "<\uff5ctool\u2581calls\u2581end\uff5c>",
)
DEEPSEEK_V3 = _in_section("deepseek-v3", _DEEPSEEK, readers.deepseek_calls, SEPARATOR)
"""<calls begin><call begin>function<sep>NAME and JSON in a fence<call end><calls end>: DeepSeek V3 and R1."""
DEEPSEEK = DEEPSEEK_V3._replace(name="deepseek")
"""<calls begin><call begin>NAME<sep>JSON<call end><calls end>: DeepSeek V3.1 and later."""
KIMI = _in_section(
    "kimi",
    ("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"),
    readers.kimi_calls,
    "<|tool_call_argument_begin|>",
)
"""<section begin><call begin>functions.NAME:0<argument begin>JSON<call end><section end>: Kimi K2."""
MISTRAL = ToolFormat("mistral", ("[TOOL_CALLS]",), readers.mistral, tags=("[ARGS]", "[CALL_ID]"))
"""[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]; since 2025 [TOOL_CALLS]name[ARGS]{...} for each."""
LLAMA = ToolFormat("llama", ("{", PYTHON_TAG), readers.llama, alone=True)
"""{"name": ..., "parameters": {...}}, several with a semicolon between; <|python_tag|>name.call(a="b"): Llama 3."""
PYTHON = ToolFormat("python", ("[",), readers.python_answer, alone=True)
"""[f(a=1), g()] as a whole answer: Llama 3.2 and 4, where the template asks for it."""
PLAIN = ToolFormat("plain", ("{", "[", "```"), readers.plain, alone=True)
"""{"name": ..., "arguments": {...}} as a whole answer, several one after the other: where a template names no format.
"""

FORMATS = (
    MISTRAL, DEEPSEEK_V3, DEEPSEEK, KIMI, LFM, GEMMA, GRANITE, COHERE, XML, GLM, HERMES, LLAMA, PYTHON, PLAIN,
)  # fmt: skip

_SIGNS: tuple[tuple[ToolFormat, str], ...] = (
    (MISTRAL, r"\[TOOL_CALLS\]"),
    (DEEPSEEK_V3, f"{_CALL}.*```json"),
    (DEEPSEEK, _CALL),
    (KIMI, r"<\|tool_call_begin\|>"),
    (LFM, r"<\|tool_call_start\|>|<\|tool_list_start\|>"),
    (GEMMA, r"<\|tool_call>"),
    (GRANITE, r"<\|tool_call\|>"),
    (COHERE, r"<\|START_ACTION\|>"),
    (XML, r"<tool_call>.*<function=|<function=.*<tool_call>"),
    (GLM, r"<tool_call>.*<arg_key>|<arg_key>.*<tool_call>"),
    (HERMES, r"<tool_call>"),
    (LLAMA, r'\{\\?"name\\?": "?\w*function[^{}\n]*\\?"parameters\\?": '),
    (PYTHON, r"\[func(?:tion)?_name1?\("),
)
"""Format -> what a template that writes it has in its text, the first that fits."""


def tool_format(template: str | None) -> ToolFormat:
    """The format of a chat template; `PLAIN` where it names none of the others."""
    return next((form for form, sign in _SIGNS if re.search(sign, template or "", re.S)), PLAIN)


class Parsed(NamedTuple):
    content: str
    calls: tuple[Fields, ...]


def parse_calls(text: str, format: ToolFormat, tools: Tools | None = None) -> Parsed:
    """The calls in an answer, and the text around them. `tools`: name -> the schema of its arguments; a call of
    another name stays text."""
    stream = CallStream(format, tools)
    first = stream.add(text)
    last = stream.close()
    return Parsed(first + last.content, last.calls)


class CallStream:
    """Text of an answer in, text that belongs to no call out; the calls are there at its end."""

    def __init__(self, format: ToolFormat, tools: Tools | None = None) -> None:
        self._format, self._tools = format, tools
        self._held = ""
        self._given = False

    def add(self, text: str) -> str:
        """The text that is sure to be in no call. From the first sign of a call on all is held."""
        self._held += text
        sure = self._sure()
        found, self._held = self._held[:sure], self._held[sure:]
        self._given = self._given or bool(found)
        return found

    def close(self) -> Parsed:
        """The rest of the text, and the calls."""
        whole = self._sure() == len(self._held)
        rest, calls = (self._held, []) if whole else self._format.read(self._held, self._tools)
        return Parsed(rest, tuple(calls)) if calls else Parsed(self._held, ())

    def _sure(self) -> int:
        """How many of the characters that are held cannot belong to a call, or be the space before it."""
        begins = self._format.begins
        if self._format.alone:
            text = self._held.lstrip()
            open_ = not self._given and (text.startswith(begins) or any(each.startswith(text) for each in begins))
            return 0 if open_ else len(self._held)
        at = min((at for each in begins if (at := self._held.find(each)) >= 0), default=-1)
        end = at if at >= 0 else len(self._held) - may_become(self._held, begins)
        return len(self._held[:end].rstrip())
