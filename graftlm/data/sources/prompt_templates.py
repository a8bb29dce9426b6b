"""Templates over labelled rows: ways of asking, as P3 (arXiv:2202.01279) and Flan (arXiv:2109.01652) put data sets of
labels and columns into words. {field} stands for a field of the row; {{ and }} are braces."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from graftlm.config.schema import config
from graftlm.data.sources.messages import Fields, RowError, missing
from graftlm.errors import nearest

FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@config
class PromptTemplate:
    prompt: str
    """What is asked, with {field} for each field of the row: "{premise} Does it follow that {hypothesis}?"."""
    completion: str
    """The answer, the same way: "{label}"."""
    words: Mapping[str, tuple[str, ...] | Mapping[str, str]] = Field(default_factory=dict)
    """By field, what its values are called: {label: [yes, maybe, no]} for 0, 1 and 2, or {label: {pos: good}}."""
    unless: str | None = None
    """Only for rows in which this field is missing or empty: Alpaca's prompt without an input has `unless: input`."""

    @model_validator(mode="after")
    def _words_of_its_fields(self) -> "PromptTemplate":
        known = {match[1] for match in FIELD.finditer(self.prompt + self.completion) if match[1] is not None}
        for name in self.words:
            if name not in known:
                raise ValueError(f"words: {name!r} stands in neither prompt nor completion. {nearest(name, known)}")
        return self


def ask(templates: Sequence[PromptTemplate], row: Fields, seed: int = 0, epoch: int = 0) -> tuple[Fields, int]:
    """(the row in one of the templates, the number of that template from 0). Of k templates that fit the row each is
    drawn once in k epochs; in which order, what the row holds and the seed decide."""
    fit = [number for number, template in enumerate(templates) if _fits(template, row)]
    # a row that lacks a field of every template is asked all the same, so that the error names the field
    fit = fit or [number for number, template in enumerate(templates) if template.unless is None]
    if not fit:
        raise RowError(f"no template is for this row: each has `unless`, of {[one.unless for one in templates]}")
    number = _draw(fit, row, seed, epoch) if len(fit) > 1 else fit[0]
    template = templates[number]
    prompt, fixed = _filled(template, template.prompt, row)
    answer, _ = _filled(template, template.completion, row)
    found: dict[str, Any] = {
        "prompt": [{"role": "user", "content": prompt, "boilerplate": fixed}],
        "completion": answer,
    }
    return found | {key: row[key] for key in ("system",) if key in row}, number


def _draw(fit: Sequence[int], row: Fields, seed: int, epoch: int) -> int:
    """The number of the template for this epoch, drawn from `fit`."""
    text = json.dumps(row, sort_keys=True, default=str)

    def key(number: int) -> bytes:
        return hashlib.sha256(f"{seed}:{number}:{text}".encode("utf-8", "surrogatepass")).digest()

    return sorted(fit, key=key)[epoch % len(fit)]


def _fits(template: PromptTemplate, row: Fields) -> bool:
    """Whether the row has a value for every field of the template, and none for what it excludes."""
    # `in` first and no `get`: to look at a field is not to use it
    empty = {key for key, value in row.items() if value is None or value == ""}
    names = {m[1] for m in FIELD.finditer(template.prompt + template.completion) if m[1] is not None}
    if template.unless is not None and template.unless in row and template.unless not in empty:
        return False
    return all(name in row and name not in empty for name in names)


def _filled(template: PromptTemplate, text: str, row: Fields) -> tuple[str, list[list[int]]]:
    """The text with the row's values, and [start, end] of each piece of it that is the template's own."""
    filled, fixed, end = "", list[list[int]](), 0
    for match in (*FIELD.finditer(text), None):
        own = text[end : match.start() if match else len(text)]
        own += match[0][0] if match and match[1] is None else ""  # {{ and }} stand for one brace
        if own:
            fixed.append([len(filled), len(filled) + len(own)])
        filled += own
        if match:
            filled += _word(template, match[1], row) if match[1] is not None else ""
            end = match.end()
    return filled, fixed


def _word(template: PromptTemplate, name: str, row: Fields) -> str:
    value: Any = row.get(name)
    if value is None:
        hint = "" if re.fullmatch(r"\w+", name) else " (A brace that stands for itself is written twice: {{)"
        raise RowError(f"{missing(row, name)}{hint}")
    words = template.words.get(name)
    if words is None:
        if not isinstance(value, str | int | float):
            raise RowError(f"field {name!r} must be text or a number, this is a {type(value).__name__}: {value!r:.60}")
        return str(value)
    if isinstance(words, Mapping):
        if str(value) not in words:
            raise RowError(f"field {name!r} is {value!r:.60}, and `words` has {sorted(words)}")
        return words[str(value)]
    number = int(value) if str(value).isdigit() else -1
    if not 0 <= number < len(words):
        raise RowError(f"field {name!r} is {value!r:.60}, and `words` has {len(words)} words, for 0 and up")
    return words[number]
