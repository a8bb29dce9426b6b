"""Rows of a source, read strictly and in one pass.

A row that cannot be used is left out, and reported as `file:line: reason`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from graftlm.data.chat.turn_order import TurnOrder
from graftlm.data.sources.fields import Tracked, Unread, unread
from graftlm.data.sources.formats import FORMATS, RowError, detect
from graftlm.data.sources.messages import refuse_media
from graftlm.data.sources.other_trainers import Part
from graftlm.data.sources.parts import parts_of
from graftlm.data.sources.prompt_templates import ask
from graftlm.data.sources.read_row import read_row
from graftlm.data.sources.records import Problem, records
from graftlm.data.sources.source import Row, SourceConfig
from graftlm.errors import DataError, numbered

SAME = "says the same as"
AHEAD = 100
"""Rows that decide the format of a file."""


def load_rows(
    source: str | SourceConfig,
    *,
    network: bool = False,
    strict: bool = False,
    problems: list[Problem] | None = None,
    score: str | None = None,
    turn_order: TurnOrder = "refuse",
    seed: int = 0,
) -> tuple[list[Row], str]:
    """Read all rows of a source that can be used.

    Returns (rows, the name of their format). `problems` receives what is wrong with rows, those that are left out and
    those that stay. Raises DataError, which lists rows by file and line, where no row can be used, and for any row that
    cannot be used where there is no such list or under `strict`. `score` names a field that must hold a number. `seed`
    draws among `templates`.
    """
    path = source if isinstance(source, str) else source.path
    rows: list[Row] = []
    all_problems: list[Problem] = []
    formats: list[str] = []
    seen: dict[int, Row] = {}
    how: dict[str, Any] = {"network": network, "score": score, "turn_order": turn_order, "seed": seed}
    for found in stream_rows(source, formats=formats, **how):
        if isinstance(found, Problem):
            all_problems.append(found)
            continue
        rows.append(found)
        first = seen.setdefault(hash(tuple((m.role, m.content) for m in found.messages)), found)
        if first is not found and _same(first, found):
            all_problems.append(Problem(found.where, f"{SAME} {first.where}", left_out=False))
    name = ", ".join(formats)
    out = [str(problem) for problem in all_problems if problem.left_out]
    if out and (problems is None or strict or not rows):
        raise DataError(
            f"{len(out)} rows of {path} cannot be used ({len(rows)} can; the format is {name or 'not known'}):\n"
            + numbered(out),
            code="unusable-rows",
        )
    if not rows:
        raise DataError(
            f"{path}: holds no rows: in .jsonl a line is a row, in .csv a line below the header", code="no-rows"
        )
    if problems is not None:
        problems += all_problems
    return rows, name


def stream_rows(
    source: str | SourceConfig,
    *,
    network: bool = False,
    formats: list[str] | None = None,
    score: str | None = None,
    turn_order: TurnOrder = "refuse",
    seed: int = 0,
    epoch: int = 0,
) -> Iterator[Row | Problem]:
    """Rows and problems of a source in the order of its files, one at a time, so that memory does not grow with them.
    Names of formats go into `formats` as they are met. `templates` are drawn by `seed`, anew for each `epoch`."""
    if isinstance(source, str):
        source = SourceConfig(path=source)
    for part in parts_of(source.path):
        yield from (Problem(source.path, note, left_out=False) for note in part.notes)
        name = source.format if part.format == "auto" else part.format
        name = "prompt-completion" if source.templates and name == "auto" else name
        found = _instances(records(part.path, network=network))
        ahead = list(islice(found, AHEAD)) if name == "auto" else []
        name = _format_of(part, ahead) if name == "auto" else name
        unread_keys: dict[Unread, Unread] = {}
        for where, record in chain(ahead, found):
            if isinstance(record, Problem):
                yield record
                continue
            try:
                if not isinstance(record, dict):
                    several = " (a file that is one list of rows ends in .json)" if isinstance(record, list) else ""
                    raise RowError(
                        f"a row is a mapping of fields to values, this is a {type(record).__name__}{several}"
                    )
                tracked = Tracked(record)
                fields = part.reshape(tracked)
                template = None
                if source.templates:
                    fields, template = ask(source.templates, fields, seed, epoch)
                name = detect({**fields}) if name == "auto" else name  # of a copy: to look is not to use
                fields = fields if isinstance(fields, Tracked) else Tracked(fields)
                if formats is not None and name not in formats:
                    formats.append(name)
                if name != "text":
                    refuse_media(fields)
                row, notes = read_row(FORMATS[name](fields), where, tracked, score, turn_order)
                ignored = unread(tracked, *([fields] if fields is not tracked else []))
                if ignored or template is not None:
                    row = replace(row, unread=unread_keys.setdefault(ignored, ignored), template=template)
            except RowError as error:
                yield Problem(where, f"{error}{_otherwise(record, part, source, name)}")
                continue
            yield row
            yield from (Problem(where, note, left_out=False) for note in notes)


def _otherwise(record: Any, part: Part, source: SourceConfig, name: str) -> str:
    """A sentence on a row that cannot be used because its format is not that of its file; else empty."""
    if isinstance(record, dict) and name != "auto" and (source.format, part.format) == ("auto", "auto"):
        with suppress(RowError):
            own = detect(part.reshape(record))
            if own != name and not source.templates:
                return f" (the row is of the format {own!r}, its file {name!r}: give it a file of its own)"
    return ""


def _format_of(part: Part, ahead: Sequence[tuple[str, Any]]) -> str:
    """The format that most of the first rows have, so that a damaged row does not decide for a file."""
    votes: Counter[str] = Counter()
    for _, record in ahead:
        if isinstance(record, dict):
            with suppress(RowError):
                votes[detect(part.reshape(record))] += 1
    return votes.most_common(1)[0][0] if votes else "auto"


def _instances(found: Iterator[tuple[str, Any] | Problem]) -> Iterator[tuple[str, Any]]:
    """A task of Super-NaturalInstructions is one record with many instances; each is a row."""
    for one in found:
        if isinstance(one, Problem):
            yield one.where, one
            continue
        where, record = one
        if not isinstance(record, Mapping) or not isinstance(record.get("Instances"), list):
            yield one
            continue
        task = {key: value for key, value in record.items() if key != "Instances"}
        for number, instance in enumerate(record["Instances"], start=1):
            yield f"{where}: instance {number}", task | instance if isinstance(instance, dict) else instance


def _same(first: Row, second: Row) -> bool:
    return (
        first.messages == second.messages
        and first.tools == second.tools
        and first.rejected == second.rejected
        and first.desirable == second.desirable
    )
