"""Rows that only ask: what a model is to answer by itself, while it is trained (`rl`).

A prompt is what generation sees, token for token. An answer that a row has all the same is never trained: it is the
reference that scorers compare with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftlm.data.batches.pack import Example, Group
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.roles import Role
from graftlm.data.quality.report import Report, unwritten_notes
from graftlm.data.sources.formats import Message
from graftlm.data.sources.row_cache import unread_keys
from graftlm.data.sources.source import DataConfig, Row
from graftlm.errors import DataError, numbered

AT_ONCE = 1000
"""Prompts that are rendered together."""


@dataclass(frozen=True)
class PromptExample(Example):
    """What is asked: ids int32 [n] are those of the prompt, and no token of them is trained."""

    messages: tuple[Message, ...] = ()
    reference: str | None = None
    """The row's own answer, where it has one."""


def asked_in(row: Row) -> tuple[list[Message], str | None]:
    """(what is said before the last answer of a row, that answer if it was liked); all and None where there is none."""
    *before, last = row.messages
    if last.role != "assistant":
        return [*row.messages], None
    return before, None if row.desirable is False else last.content


def prepare_prompts(
    rows: Sequence[Row], renderer: Renderer, data: DataConfig, *, room: int, format: str = ""
) -> tuple[list[PromptExample], list[Row], Report]:
    """Prompts, the rows that they are of, and the report. `room` are the tokens of an answer: with them a prompt must
    be within max_tokens.

    Raises DataError where none is left, and where `data` asks for it: `strict`, or over_length `error`.
    """
    report = Report(format, data.mask, data.max_tokens, template_hash=renderer.template_hash, prompts=True)
    prompts: list[PromptExample] = []
    prompt_rows: list[Row] = []
    problems: list[str] = []
    most = data.max_tokens - room
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        found = renderer.prompts_of_all([(asked_in(row)[0], row.tools, row.variables) for row in some])
        for row, ids in zip(some, found, strict=True):
            if isinstance(ids, DataError):
                problems.append(f"{row.where}: {ids}")
            elif len(ids) > most and data.over_length == "error":
                problems.append(
                    f"{row.where}: {len(ids)} tokens leave no room for an answer: {most} do. Raise max_tokens"
                )
            elif len(ids) > most:
                report.dropped_over_length.append(row.where)
            else:
                messages, reference = asked_in(row)
                prompts.append(
                    PromptExample(ids, np.zeros(len(ids), np.float32), row.where, None, tuple(messages), reference)
                )
                prompt_rows.append(row)
    if problems and (data.strict or data.over_length == "error" or not prompts):
        raise DataError(
            f"{len(problems)} of {len(rows)} rows cannot be asked:\n" + numbered(problems), code="unusable-rows"
        )
    if not prompts:
        raise DataError(
            f"no prompt is left: all {len(rows)} are longer than the {most} tokens that data.max_tokens="
            f"{data.max_tokens} leaves beside rl.max_new_tokens={room}",
            code="no-rows-left",
        )
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    longest = int(lengths.argmax())
    report.problems += problems
    report.notes += unread_keys(rows)
    report.rows, report.tokens = len(prompts), int(lengths.sum())
    report.longest_tokens, report.longest_row = int(lengths[longest]), prompts[longest].where
    report.prompt_tokens.add(lengths)
    report.notes += _lost(prompt_rows, renderer)
    if references := sum(prompt.reference is not None for prompt in prompts):
        report.notes.append(f"{references:,} rows have an answer: it is not trained, scorers may compare with it")
    return prompts, prompt_rows, report


def _lost(rows: Sequence[Row], renderer: Renderer) -> list[str]:
    """Notes on what the chat template does not write of these prompts. Thoughts of earlier answers do not count."""
    whole = [(asked_in(row)[0], row.tools, row.variables) for row in rows]
    some = [one for one in whole if one[1] or any(message.tool_calls for message in one[0])]
    found = [parts for parts in renderer.lost_of_all(some) if not isinstance(parts, DataError)]
    notes = unwritten_notes(0, sum(parts.tools for parts in found))
    if calls := sum(bool(parts.calls) for parts in found):
        notes.append(f"{calls:,} rows have earlier calls of tools that the chat template does not write")
    return notes


def shown_prompts(prompts: Sequence[Example | Group], renderer: Renderer, count: int) -> list[dict[str, Any]]:
    """The first prompts token by token, as `preflight.shown_rows` has rows."""
    return [
        {
            "where": prompt.where,
            "raw": False,
            "tokens": [
                {"id": int(i), "text": text, "role": Role.USER.label, "weight": 0.0}
                for i, text in zip(ids, renderer.token_texts(ids.tolist()), strict=True)
            ],
        }
        for prompt, ids in ((prompt, prompt.answers[0].ids) for prompt in prompts[:count])
    ]
