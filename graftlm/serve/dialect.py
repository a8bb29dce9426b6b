"""How a model writes what is no plain text: its thoughts, and calls of tools. Text of an answer in, parts out."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from graftlm.data.chat.render import Renderer
from graftlm.data.sources.messages import Fields
from graftlm.generation.grammar import Grammar
from graftlm.generation.reasoning import ReasoningStream, Tags, reasoning_tags
from graftlm.tool_calls.force import call_grammar
from graftlm.tool_calls.formats import MISTRAL, CallStream, ToolFormat, tool_format
from graftlm.tool_calls.readers import Tools

TAIL = 32
"""Tokens of a prompt in which the tag that opens thoughts is looked for."""


class Part(NamedTuple):
    """A part of one answer: its text, its thoughts, or a whole call of a tool."""

    text: str = ""
    thought: str = ""
    call: Mapping[str, Any] | None = None
    """{id, name, arguments}, arguments as JSON text."""


@dataclass(frozen=True)
class Dialect:
    """What a chat template and a tokenizer say of the answers of a model."""

    tags: Tags | None
    format: ToolFormat

    @classmethod
    def of(cls, renderer: Renderer) -> "Dialect":
        return cls(reasoning_tags(renderer.template, renderer.tokenizer), tool_format(renderer.template))

    def kept_ids(self, renderer: Renderer, *, tools: bool) -> frozenset[int]:
        """Special tokens that are read here, and so are a part of the text."""
        wanted = {*(self.tags or ()), *(self.format.kept if tools else ())}
        found = (renderer.tokenizer.backend_tokenizer.token_to_id(text) for text in wanted)
        return frozenset(i for i in found if i is not None) & renderer.tokenization.special_ids

    def forced(self, tools: Sequence[Fields], name: str | None, renderer: Renderer, *, parallel: bool) -> Grammar:
        """The grammar of a call of one of the tools, or of the one of this name."""
        return call_grammar(tools, self.format, renderer.tokenizer, name=name, parallel=parallel)


class Parts:
    """The text of one answer, split as it comes. `tools`: those that it may call; `plain`: it has no thoughts."""

    def __init__(
        self, dialect: Dialect, renderer: Renderer, prompt: Sequence[int], tools: Tools, *, plain: bool
    ) -> None:
        self._thoughts: ReasoningStream | None = None
        self._calls: CallStream | None = None
        self._short_ids = dialect.format is MISTRAL  # its templates take no others
        if dialect.tags is not None and not plain:
            tail = renderer.tokenizer.decode(prompt[-TAIL:], clean_up_tokenization_spaces=False)
            self._thoughts = ReasoningStream(dialect.tags, opened=dialect.tags.opened_by(tail))
        if tools:
            self._calls = CallStream(dialect.format, tools)

    def add(self, text: str) -> list[Part]:
        if self._thoughts is None:
            return self._content(text)
        thought, content = self._thoughts.add(text)
        return [*_thought(thought), *self._content(content)]

    def close(self) -> list[Part]:
        """The rest, with the calls."""
        found: list[Part] = []
        if self._thoughts is not None:
            thought, content = self._thoughts.close()
            found += [*_thought(thought), *self._content(content)]
        if self._calls is not None:
            rest, calls = self._calls.close()
            found += [Part(text=rest)] if rest else []
            found += [Part(call=self._called(call)) for call in calls]
        return found

    def _content(self, text: str) -> list[Part]:
        sure = text if self._calls is None else self._calls.add(text)
        return [Part(text=sure)] if sure else []

    def _called(self, call: Fields) -> dict[str, Any]:
        function = call["function"]
        own = secrets.token_hex(5)[:9] if self._short_ids else f"call_{secrets.token_hex(12)}"
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return {"id": call.get("id") or own, "name": function["name"], "arguments": arguments}


def _thought(text: str) -> list[Part]:
    return [Part(thought=text)] if text else []
