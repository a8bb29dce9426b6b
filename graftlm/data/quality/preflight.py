"""Rows -> examples and the pre-flight report, before training starts.

`prepare` renders and masks rows on all cores, applies the over-length policy and refuses rows that would teach nothing.
What it counted on the way is the report (`report.py`). `stream` does the same for rows without end. What the rows
themselves look like (duplicates, languages, refusals) is in `survey.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.data.batches.pack import Example
from graftlm.data.chat import token_cache
from graftlm.data.chat.parallel import lasting, many, rendered
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.roles import Role
from graftlm.data.chat.token_columns import LOST_THOUGHTS, LOST_TOOLS, MOVED_SYSTEM, UNREAD_VARIABLES, Columns, join
from graftlm.data.quality.piece_counts import PieceCounts, count_pieces
from graftlm.data.quality.rendered_row import rendered_rows
from graftlm.data.quality.report import Report, unwritten_notes
from graftlm.data.sources.formats import TEXT
from graftlm.data.sources.row_cache import CachedRows, places, unread_keys
from graftlm.data.sources.source import DataConfig, Row
from graftlm.errors import DataError, numbered


@lasting()
def prepare(
    rows: Sequence[Row],
    renderer: Renderer,
    data: DataConfig,
    *,
    format: str = "",
    progress: Callable[[int], None] | None = None,
    workers: int | None = None,
    cache: Path | None = None,
) -> tuple[list[Example], Report]:
    """Examples ready to pack, and the report, whose `problems` are the rows that cannot be trained on and are left out.

    Raises DataError that lists them where none is left, and where `data` asks for it: `strict`, or over_length `error`.
    Many rows are rendered on `workers` cores (None: all), and kept in the folder `cache` where one is given: the same
    rows, template, tokenizer, mask and code find them there again.
    """
    report = _report(renderer, data, format)
    examples: list[Example] = []
    problems: list[str] = []
    parts: list[str] = []
    start = 0
    for some, columns in _chunks(rows, renderer, data, report, workers, cache):
        examples.extend(_examples(some, columns, renderer, data, report, problems, parts))
        for number in range(start, start + len(some)):
            if progress:
                progress(number + 1)
        start += len(some)
    wrong = [*problems, *parts]
    if wrong and (data.strict or data.over_length == "error" or not examples):
        raise DataError(
            f"{len(wrong)} of {len(rows)} rows cannot be trained on:\n" + numbered(wrong), code="unusable-rows"
        )
    report.problems += problems
    report.notes[:0] = unread_keys(rows)
    report.notes += parts + unwritten_notes(len(report.rows_without_thoughts), len(report.rows_without_tools))
    if moved := len(report.rows_with_moved_system):
        where = "is put before the first question" if data.turn_order == "merge" else "is left out"
        report.notes.append(
            f"{moved:,} rows have a system message, and the chat template has no place for it: it {where} "
            f"(data.turn_order: {data.turn_order})"
        )
    if unread := len(report.rows_with_unread_variables):
        report.notes.append(f"{unread:,} rows set template variables that the chat template does not read")
    if not examples:
        raise DataError(
            f"no row is left to train on: all {len(rows)} are longer than max_tokens={data.max_tokens}. "
            "Raise data.max_tokens, or set data.over_length: truncate",
            code="no-rows-left",
        )
    return examples, report


def stream(
    rows: Iterable[Row],
    renderer: Renderer,
    data: DataConfig,
    *,
    workers: int | None = None,
    done: Callable[[int], None] = lambda rows: None,
) -> Iterator[Example]:
    """Examples one after the other, from rows that need not fit into memory: a few chunks are held at a time. `done` is
    told now and then of how many rows all examples have been given.

    Raises DataError at the first chunk with rows that cannot be trained on, and names them.
    """
    report = _report(renderer, data, "")
    count = 0
    for some, columns in rendered(rows, renderer, data, workers):
        problems: list[str] = []
        yield from _examples(some, columns, renderer, data, report, problems, problems)
        if problems:
            raise DataError("rows cannot be trained on:\n" + numbered(problems), code="unusable-rows")
        count += len(some)
        done(count)


def _report(renderer: Renderer, data: DataConfig, format: str) -> Report:
    return Report(format=format, mask=data.mask, max_tokens=data.max_tokens, template_hash=renderer.template_hash)


def _chunks(
    rows: Sequence[Row],
    renderer: Renderer,
    data: DataConfig,
    report: Report,
    workers: int | None,
    cache: Path | None,
) -> Iterator[tuple[Sequence[Row], Columns]]:
    """The rows with their columns: from the cache, or rendered and then kept there where they are many."""
    if cache is None or not (isinstance(rows, CachedRows) or many(rows)):
        yield from rendered(rows, renderer, data, workers)
        return
    file = cache / f"{token_cache.key(rows, renderer, data)}.safetensors"
    try:
        found = token_cache.load(file)
    except token_cache.DamagedCacheError as error:
        found = None
        report.notes.append(f"rendered anew: {file} was damaged ({error})")
    if found is not None:
        report.from_cache = True
        yield rows, found
        return
    parts = []
    for some, columns in rendered(rows, renderer, data, workers):
        parts.append(columns)
        yield some, columns
    token_cache.save(file, join(parts))


def _examples(
    rows: Sequence[Row],
    columns: Columns,
    renderer: Renderer,
    data: DataConfig,
    report: Report,
    problems: list[str],
    parts: list[str],
) -> Iterator[Example]:
    """The pieces within max_tokens that teach something; the others go to the report, to the problems or, where other
    pieces of their rows stay, to `parts`."""
    starts, lengths = columns.starts, columns.ends - columns.starts
    cut_lengths = np.minimum(lengths, data.max_tokens)
    counts = count_pieces(columns, cut_lengths, renderer.tokenizer.bos_token_id)
    wrong = dict(columns.problems)
    taught: set[int] = set()
    keeps = np.ones(len(lengths), np.bool_)
    odd = (lengths > data.max_tokens) | (counts.supervised == 0) | (counts.bos > 1)
    ends = (starts + cut_lengths).tolist()
    pieces = zip(columns.rows.tolist(), starts.tolist(), ends, odd.tolist(), strict=True)
    stands = places(rows)
    for piece, (number, start, end, is_odd) in enumerate(pieces):
        where = stands[number]
        if is_odd:
            why = _why_not(piece, where, int(lengths[piece]), data, counts, report)
            if why is not None:
                keeps[piece] = False
                if why:
                    wrong.setdefault(number, why)
                continue
        if not report.end_of_turn and counts.ends[piece]:
            _ending(report, columns, slice(start, int(columns.ends[piece])), renderer)
        taught.add(number)
        yield Example(columns.ids[start:end], columns.weights[start:end], where)
    report.rows_in_part += [stands[n] for n in dict.fromkeys(columns.rows[~keeps].tolist()) if n in taught]
    for number, why in sorted(wrong.items()):
        if number in taught:
            parts.append(
                f"{stands[number]}: some of its answers, each of which is a row of its own, are left out: {why}"
            )
        else:
            problems.append(f"{stands[number]}: {why}")
    _count(report, stands, columns, cut_lengths, keeps, counts)


def _why_not(piece: int, where: str, length: int, data: DataConfig, counts: PieceCounts, report: Report) -> str | None:
    """What is wrong with a piece; empty where it is dropped as the config says, None where it is kept."""
    too_long = length > data.max_tokens
    if too_long and data.over_length == "error":
        return (
            f"{length} tokens are more than max_tokens={data.max_tokens}. Raise it, or set data.over_length to drop or "
            "truncate"
        )
    if too_long and data.over_length == "drop":
        report.dropped_over_length.append(where)
        return ""
    if too_long:
        report.truncated_over_length.append(where)
        report.truncated_without_end += bool(counts.ends_beyond[piece])
    if not counts.supervised[piece]:
        why = f"the first {data.max_tokens} tokens hold no answer" if too_long else f"mask {data.mask!r}"
        return f"no token of this row is supervised ({why}): it would teach nothing"
    if counts.bos[piece] > 1:
        return "the row begins with two begin-of-text tokens: the chat template or the row writes one too many"
    return None


def _count(
    report: Report,
    stands: Sequence[str],
    columns: Columns,
    lengths: NDArray[np.int64],
    keeps: NDArray[np.bool_],
    counts: PieceCounts,
) -> None:
    if not keeps.any():
        return
    report.rows += int(keeps.sum())
    report.tokens += int(lengths[keeps].sum())
    report.supervised_tokens += int(counts.supervised[keeps].sum())
    longest = int(np.argmax(np.where(keeps, lengths, 0)))
    if lengths[longest] > report.longest_tokens:
        report.longest_tokens, report.longest_row = int(lengths[longest]), stands[columns.rows[longest]]
    report.most_bos = max(report.most_bos, int(counts.bos[keeps].max()))
    report.prompt_tokens.add(counts.prompt[keeps])
    report.answer_tokens.add(counts.answer[keeps])
    report.rows_with_special_text += _places(stands, columns.rows[keeps & columns.control[columns.rows]])
    flags = columns.lost[columns.rows]
    report.rows_without_thoughts += _places(stands, columns.rows[keeps & (flags & LOST_THOUGHTS > 0)])
    report.rows_without_tools += _places(stands, columns.rows[keeps & (flags & LOST_TOOLS > 0)])
    report.rows_with_moved_system += _places(stands, columns.rows[keeps & (flags & MOVED_SYSTEM > 0)])
    report.rows_with_unread_variables += _places(stands, columns.rows[keeps & (flags & UNREAD_VARIABLES > 0)])
    report.unterminated += _places(stands, columns.rows[keeps & (counts.unterminated > 0)])


def _places(stands: Sequence[str], numbers: NDArray[np.int64]) -> list[str]:
    """Where these rows stand, each once."""
    return [stands[number] for number in dict.fromkeys(numbers.tolist())]


def _ending(report: Report, columns: Columns, piece: slice, renderer: Renderer) -> None:
    """What the first answer of this piece ends with, and whether all such ends of the piece are trained."""
    ending = columns.roles[piece] == Role.END_OF_TURN
    first = int(np.argmax(ending))
    run = ending[first:]
    length = int(np.argmin(run)) if not run.all() else len(run)
    report.end_of_turn = "".join(renderer.token_texts(columns.ids[piece][first : first + length].tolist()))
    report.end_of_turn_trained = bool((columns.weights[piece][ending] != 0).all())


def shown_rows(rows: Sequence[Row], renderer: Renderer, data: DataConfig, count: int) -> list[dict[str, Any]]:
    """The first rows token by token: {where, raw, tokens: [{id, text, role, weight}]}, one for each piece of a row."""
    token_rows = []
    for row in rows[:count]:
        for piece in rendered_rows(row, renderer, mask=data.mask, prompt_weight=data.prompt_weight):
            parts = zip(piece.ids, piece.tokens, piece.roles, piece.weights, strict=True)
            tokens = [{"id": int(i), "text": t, "role": r, "weight": float(w)} for i, t, r, w in parts]
            token_rows.append({"where": row.where, "raw": row.messages[0].role == TEXT, "tokens": tokens})
    return token_rows
