"""Templates over labelled rows: ways of asking, as P3 (arXiv:2202.01279) and Flan (arXiv:2109.01652) put data sets of
labels and columns into words. {field} stands for a field of the row; {{ and }} are braces."""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from graftlm.config import config
from graftlm.data.messages import Fields, RowError, missing
from graftlm.errors import nearest

FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@config
class Template:
    prompt: str
    """What is asked, with {field} for each field of the row: "{premise} Does it follow that {hypothesis}?"."""
    completion: str
    """The answer, the same way: "{label}"."""
    words: Mapping[str, tuple[str, ...] | Mapping[str, str]] = Field(default_factory=dict)
    """By field, what its values are called: {label: [yes, maybe, no]} for 0, 1 and 2, or {label: {pos: good}}."""

    @model_validator(mode="after")
    def _words_of_its_fields(self) -> "Template":
        known = {match[1] for match in FIELD.finditer(self.prompt + self.completion) if match[1] is not None}
        for name in self.words:
            if name not in known:
                raise ValueError(f"words: {name!r} stands in neither prompt nor completion. {nearest(name, known)}")
        return self


def ask(templates: Sequence[Template], row: Fields) -> Fields:
    """The row in one of the templates, drawn by what the row holds: the same row is always asked the same way."""
    text = json.dumps(row, sort_keys=True, default=str)
    template = templates[zlib.crc32(text.encode("utf-8", "surrogatepass")) % len(templates)]
    found = {
        "prompt": _filled(template, template.prompt, row),
        "completion": _filled(template, template.completion, row),
    }
    return found | {key: row[key] for key in ("system",) if key in row}


def _filled(template: Template, text: str, row: Fields) -> str:
    def put(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        return _word(template, match[1], row)

    return FIELD.sub(put, text)


def _word(template: Template, name: str, row: Fields) -> str:
    value: Any = row.get(name)
    if value is None:
        written = "" if re.fullmatch(r"\w+", name) else " (A brace that stands for itself is written twice: {{)"
        raise RowError(f"{missing(row, name)}{written}")
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
