"""Answers that are what a grammar allows: JSON of a schema, a regular expression, or a grammar in Lark's notation.

llguidance (github.com/guidance-ai/llguidance) says which ids may come next; here it is asked once a token, and ids that
may not get the logit -inf before anything else acts on them. It comes with the extra `serve`.

JSON is written in one line, as Python's `json.dumps` writes it: `{"a": 1, "b": [2, 3]}`. White space that a schema
leaves free would be without an end, and some models never find one.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from graftlm.errors import RequestError, first_lines

Bits = np.ndarray[Any, np.dtype[np.uint32]]

JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""llguidance's options of a schema; within a Lark grammar they stand in the schema as `x-guidance`."""

COMPILED = 64
"""Grammars that a compiler keeps."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must be, for any tokenizer."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> "Grammar":
        """JSON that is valid by a schema. RequestError where it is no mapping."""
        if not isinstance(schema, Mapping):
            raise RequestError(
                f"a JSON schema is an object such as {{'type': 'object'}}, this is {schema!r:.60}", code="no-schema"
            )
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """A text that a regular expression matches from its beginning to its end; in the syntax of Rust's `regex`, so
        without looking ahead or back and without references."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> "Grammar":
        """Lark's notation as llguidance reads it (its docs/syntax.md): rules from `start` on, `%json {...}` for JSON of
        a schema, `<[7]>` for the token of the id 7."""
        return cls("lark", text)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Grammar":
        """One of some texts. RequestError where there is none."""
        if not texts:
            raise RequestError("a choice needs one text at least", code="no-choice")
        return cls("lark", "start: " + " | ".join(map(json.dumps, texts)))


class GrammarCompiler:
    """Compiles grammars for the tokenizer of a model; making one takes a second for a large vocabulary.

    `stop_ids` end the answers, and are allowed only where a grammar allows an end. Raises RequestError where llguidance
    is not installed or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise RequestError(
                "answers by a grammar or a JSON schema need llguidance: pip install 'graftlm[serve]'",
                code="missing-package",
            ) from None
        self.stop_ids = tuple(map(int, stop_ids))
        try:
            self._tokenizer = from_tokenizer(tokenizer, eos_token=list(self.stop_ids) or None)
        except Exception as error:  # of a kind of tokenizer that it does not know
            raise RequestError(
                f"llguidance cannot read this tokenizer, so answers cannot follow a grammar: {first_lines(error)}. Ask "
                "without a schema and without a grammar",
                code="unsupported-tokenizer",
            ) from None
        self.compile = lru_cache(maxsize=COMPILED)(self._compile)
        """Grammar -> CompiledGrammar, made once. RequestError for one that is wrong or not supported."""

    def _compile(self, grammar: Grammar) -> "CompiledGrammar":
        from llguidance import LLMatcher

        if grammar.kind == "json_schema":
            source = LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_STYLE)  # type: ignore[arg-type]
        elif grammar.kind == "regex":
            source = LLMatcher.grammar_from_regex(grammar.text)
        else:
            source = LLMatcher.grammar_from_lark(grammar.text)
        is_wrong, messages = LLMatcher.validate_grammar_with_warnings(source, self._tokenizer)
        if is_wrong:
            raise _refusal(grammar, messages[0])
        compiled = CompiledGrammar(
            LLMatcher(self._tokenizer, source, log_level=0), self._tokenizer.vocab_size, self.stop_ids
        )
        compiled.matcher().bits()  # the first mask takes longest, and prepares what all copies share
        return compiled


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A grammar for one tokenizer."""

    start: Any
    """llguidance's LLMatcher before the first token, which is copied."""
    size: int
    """Ids that the tokenizer has."""
    stop_ids: tuple[int, ...]

    def matcher(self) -> "Matcher":
        """What follows one answer from its first token on."""
        return Matcher(self.start.deep_copy(), self.size)


class Matcher:
    """Follows one answer, and says what may come next."""

    def __init__(self, state: Any, size: int) -> None:
        self.error: RequestError | None = None
        """Why the answer cannot go on: a limit of llguidance."""
        self.is_complete = False
        """Whether nothing more may come."""
        self._state = state
        self._bits = np.zeros((size + 31) // 32, np.uint32)
        self._filling: Future[None] | None = None
        self._fill()

    def bits(self) -> Bits:
        """A bit for each id of the tokenizer: whether it may come next."""
        if self._filling is not None:
            self._filling.result()
            self._filling = None
            self._look_for_errors()
        return self._bits

    def take(self, token: int) -> None:
        """Go on with a token that may come next."""
        self.bits()
        if self.error is None and not self.is_complete:
            self._state.consume_token(token)
            self._look_for_errors()
            self._fill()

    def _fill(self) -> None:
        """Begin to find out what may come next, while the model computes: llguidance does not hold Python's lock."""
        self.is_complete = not self._state.is_error() and bool(self._state.is_stopped())
        if self.error is None and not self.is_complete:
            self._filling = _workers().submit(self._compute)

    def _compute(self) -> None:
        """In a thread of its own, which keeps the state and the bits alive."""
        self._state.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)

    def _look_for_errors(self) -> None:
        if self._state.is_error():
            self.error = RequestError(
                f"the answer cannot go on by its grammar: {_line(self._state.get_error())}. A simpler schema or "
                "grammar may do",
                code="grammar-too-complex",
            )


def mask_logits(logits: Tensor, matchers: Sequence[Matcher | None]) -> None:
    """Make the logits [n, V] of ids that may not come next -inf, in place: those too that the model has and the
    tokenizer has not. None: all may."""
    rows = [row for row, matcher in enumerate(matchers) if matcher is not None]
    some = [matcher for matcher in matchers if matcher is not None]
    allowed = np.zeros((len(some), (logits.shape[1] + 31) // 32), np.uint32)
    for row, matcher in zip(allowed, some, strict=True):
        bits = matcher.bits()[: len(row)]
        row[: len(bits)] = bits
    hidden = np.unpackbits(~allowed.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    mask = torch.from_numpy(hidden).to(logits.device)
    if len(rows) == len(logits):
        logits.masked_fill_(mask, float("-inf"))
    else:
        logits[rows] = logits[rows].masked_fill_(mask, float("-inf"))


@lru_cache(maxsize=1)
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=2, thread_name_prefix="graft-grammar")


def _refusal(grammar: Grammar, message: str) -> RequestError:
    if grammar.kind != "json_schema":
        what = "the regular expression" if grammar.kind == "regex" else "the grammar"
        return RequestError(f"{what} is wrong or not supported: {_line(message)}", code="invalid-grammar")
    keys = re.findall(r'"([^"]+)"', message) if message.startswith("Unimplemented keys") else []
    places = [place for key in keys for place in _places(json.loads(grammar.text), key, "#")]
    if places:
        return RequestError(
            f"the JSON schema uses keywords that cannot be followed token by token: {', '.join(places)}. Leave them "
            "out, and check the answer for them afterwards",
            code="unsupported-schema",
        )
    hint = ": write anyOf where no value fits two of them" if "oneOf" in message else ""
    return RequestError(f"the JSON schema is wrong or not supported: {_line(message)}{hint}", code="unsupported-schema")


def _line(message: str) -> str:
    return " ".join(message.split())


def _places(schema: Any, key: str, at: str) -> Iterator[str]:
    """Where a key stands, as JSON pointers."""
    entries = schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ()
    for name, value in entries:
        if name == key:
            yield f"{at}/{name}"
        yield from _places(value, key, f"{at}/{name}")
