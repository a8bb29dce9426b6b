"""The pre-flight report: what training will see, said before it starts.

`prepare` renders and masks rows, applies the over-length policy and refuses rows that would teach nothing; what it
counted on the way is the report.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from graftlm.data.formats import TEXT
from graftlm.data.mask import weights
from graftlm.data.pack import Example
from graftlm.data.render import Rendered, Renderer, Role
from graftlm.data.source import DataConfig, Row
from graftlm.errors import DataError, numbered


@dataclass
class Report:
    """Counts are of rows and tokens that are kept, unless they say otherwise."""

    format: str = ""
    mask: str = "response"
    max_tokens: int = 0
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest_tokens: int = 0
    longest_row: str = ""
    dropped_over_length: list[str] = field(default_factory=list)
    truncated_over_length: list[str] = field(default_factory=list)
    truncated_without_end: int = 0
    """Truncated rows whose last answer lost the token that ends it."""
    end_of_turn: str = ""
    """What the first answer ends with, as text; empty where the template writes nothing after an answer."""
    end_of_turn_trained: bool = False
    most_bos: int = 0
    """The most begin-of-text tokens at the start of any row: more than one is refused."""
    rows_with_special_text: list[str] = field(default_factory=list)
    """Rows whose own text contains control tokens of the tokenizer, which the model will read as such."""
    template_hash: str = ""
    problems: list[str] = field(default_factory=list)
    """Rows of the files that cannot be used and are left out: `file:line: reason`."""
    notes: list[str] = field(default_factory=list)
    """What was noticed of rows that are kept, and of what the loss does not use."""
    shared_share: float | None = None
    """Share of the tokens that shared beginnings save, over the first steps; None where sharing is off."""

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / max(1, self.tokens)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "supervised_share": self.supervised_share}

    def lines(self) -> list[tuple[str, str]]:
        """The report as (name, value) pairs for a table."""
        over = []
        if self.dropped_over_length:
            over.append(f"{len(self.dropped_over_length)} dropped")
        if self.truncated_over_length:
            over.append(f"{len(self.truncated_over_length)} truncated, {self.truncated_without_end} lost their ending")
        end = repr(self.end_of_turn) if self.end_of_turn else "nothing: the template does not end an answer"
        pairs = [
            ("format", self.format),
            ("rows", f"{self.rows:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("supervised", f"{self.supervised_tokens:,} ({self.supervised_share:.1%}), mask {self.mask!r}"),
            ("longest row", f"{self.longest_tokens:,} tokens ({self.longest_row})"),
            (f"over {self.max_tokens:,} tokens", "; ".join(over) or "none"),
            ("an answer ends with", f"{end}, {'trained' if self.end_of_turn_trained else 'NOT trained'}"),
            ("begin-of-text tokens", f"at most {self.most_bos} a row"),
            ("chat template", self.template_hash),
        ]
        if self.shared_share is not None:
            pairs.insert(3, ("shared beginnings", f"save {self.shared_share:.1%} of the tokens of a step"))
        if self.rows_with_special_text:
            shown = ", ".join(self.rows_with_special_text[:3])
            pairs.append(("control tokens in text", f"{len(self.rows_with_special_text)} rows: {shown}"))
        if self.problems:
            said = f"{len(self.problems):,} rows that can NOT be used:\n{numbered(self.problems, 5)}"
            pairs.append(("left out", said))
        if self.notes:
            pairs.append(("noted", f"{len(self.notes):,}:\n{numbered(self.notes, 5)}"))
        return pairs


def prepare(
    rows: Sequence[Row],
    renderer: Renderer,
    data: DataConfig,
    *,
    format: str = "",
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Example], Report]:
    """Examples ready to pack, and the report. Raises DataError that lists every row that cannot be trained on."""
    report = Report(format=format, mask=data.mask, max_tokens=data.max_tokens, template_hash=renderer.template_hash)
    examples: list[Example] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            for rendered in renderer.rows(row.messages, row.tools):
                example = _fit(rendered, row, data, report)
                if example is not None:
                    _count(report, rendered, example, row, renderer)
                    examples.append(example)
        except DataError as error:
            problems.append(f"{row.where}: {error}")
        if progress:
            progress(number)
    if problems:
        raise DataError(f"{len(problems)} of {len(rows)} rows cannot be trained on:\n" + numbered(problems))
    if not examples:
        raise DataError(
            f"no row is left to train on: all {len(rows)} are longer than max_tokens={data.max_tokens}. "
            "Raise data.max_tokens, or set data.over_length: truncate"
        )
    return examples, report


def _fit(rendered: Rendered, row: Row, data: DataConfig, report: Report) -> Example | None:
    """The row within max_tokens, or None where it is dropped."""
    token_weights = weights(rendered, data.mask, data.prompt_weight)
    length = len(rendered.ids)
    if length > data.max_tokens:
        if data.over_length == "error":
            raise DataError(
                f"{length} tokens are more than max_tokens={data.max_tokens}. Raise it, or set data.over_length to "
                "drop or truncate"
            )
        if data.over_length == "drop":
            report.dropped_over_length.append(row.where)
            return None
        report.truncated_over_length.append(row.where)
        report.truncated_without_end += Role.END_OF_TURN in rendered.roles[data.max_tokens :]
    example = Example(rendered.ids[: data.max_tokens], token_weights[: data.max_tokens], row.where)
    if not example.weights.any():
        why = (
            f"the first {data.max_tokens} tokens hold no answer" if length > data.max_tokens else f"mask {data.mask!r}"
        )
        raise DataError(f"no token of this row is supervised ({why}): it would teach nothing")
    return example


def _count(report: Report, rendered: Rendered, example: Example, row: Row, renderer: Renderer) -> None:
    report.rows += 1
    report.tokens += len(example)
    report.supervised_tokens += int(np.count_nonzero(example.weights))
    if len(example) > report.longest_tokens:
        report.longest_tokens, report.longest_row = len(example), row.where
    if any(special in message.content for message in row.messages for special in renderer.special_texts):
        report.rows_with_special_text.append(row.where)
    bos = renderer.tokenizer.bos_token_id
    if bos is not None and len(rendered.ids) > 1:
        most = 2 if rendered.ids[0] == bos and rendered.ids[1] == bos else int(rendered.ids[0] == bos)
        report.most_bos = max(report.most_bos, most)
        if most > 1:
            raise DataError(
                "the row begins with two begin-of-text tokens: the chat template or the row writes one too many"
            )
    ending = rendered.roles == Role.END_OF_TURN
    if not report.end_of_turn and ending.any():
        report.end_of_turn = "".join(renderer.token_texts(rendered.ids[ending][: _first_run(ending)]))
        trained = weights(rendered, report.mask)[ending]
        report.end_of_turn_trained = bool(trained.all())


def _first_run(ending: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
    first = int(np.argmax(ending))
    run = ending[first:]
    return int(np.argmin(run)) if not run.all() else len(run)


def shown_rows(rows: Sequence[Row], renderer: Renderer, mask: str, count: int) -> list[dict[str, Any]]:
    """The first rows token by token: {where, raw, tokens: [{id, text, role, weight}]}."""
    shown = []
    for row in rows[:count]:
        rendered = renderer.rows(row.messages, row.tools)[-1]
        parts = zip(
            rendered.ids,
            renderer.token_texts(rendered.ids.tolist()),
            rendered.roles,
            weights(rendered, mask),
            strict=True,
        )
        tokens = [
            {"id": int(i), "text": t, "role": Role(r).name.lower().replace("_", "-"), "weight": float(w)}
            for i, t, r, w in parts
        ]
        shown.append({"where": row.where, "raw": row.messages[0].role == TEXT, "tokens": tokens})
    return shown
