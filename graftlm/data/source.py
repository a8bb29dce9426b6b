"""Where rows come from, and which of them are held out.

Files are read strictly and in one pass: every row that cannot be used is reported as `file:line: reason`.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftlm.config import Count, Flag, PositiveCount, Share, config
from graftlm.data import docstrings
from graftlm.data.formats import FORMATS, Message, RowError, check, detect
from graftlm.errors import DataError, nearest, numbered


@config
class SourceConfig:
    path: str
    """A .jsonl, .json, .csv or .parquet file; `hub:org/name` or `hub:org/name:split`; or `builtin:docstrings`."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"] = "auto"


@config
class DataConfig:
    train: str | SourceConfig
    held_out: Count | Share | str | SourceConfig = 0
    """Rows (100), a share (0.05), or a source of its own; rows with the same group never end up on both sides."""
    mask: Literal["response", "instruction", "everything"] = "response"
    max_tokens: PositiveCount = 1024
    over_length: Literal["drop", "truncate", "error"] = "drop"
    pack: Flag = True
    """Lay rows end to end with attention kept apart; false runs one row at a time, for models that cannot be packed."""


@dataclass(frozen=True)
class Row:
    """A conversation, where it stands, and the group that decides on which side of a split it falls."""

    messages: list[Message]
    where: str
    group: str


BUILTIN: dict[str, Callable[[], list[dict[str, str]]]] = {"docstrings": docstrings.rows}


def load_rows(source: str | SourceConfig, *, network: bool = False) -> tuple[list[Row], str]:
    """All rows of a source and the name of their format; raises DataError that lists every bad row by file and line."""
    if isinstance(source, str):
        source = SourceConfig(path=source)
    rows: list[Row] = []
    problems: list[str] = []
    name = source.format
    for where, fields in _records(source.path, problems, network):
        try:
            if not isinstance(fields, dict):
                raise RowError(f"a row is a mapping of fields to values, this is a {type(fields).__name__}")
            name = detect(fields) if name == "auto" else name  # type: ignore[assignment]
            messages = FORMATS[name](fields)
            check(messages)
            rows.append(Row(messages, where, _group(fields, messages)))
        except RowError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise DataError(
            f"{len(problems)} rows of {source.path} cannot be used ({len(rows)} can; the format is {name}):\n"
            + numbered(problems)
        )
    if not rows:
        raise DataError(f"{source.path}: holds no rows. Each line of a .jsonl file is one row")
    return rows, name


def _group(fields: dict[str, Any], messages: list[Message]) -> str:
    """The row's own `group`, or else its first question: the same question must not be both trained and held out."""
    given = fields.get("group")
    return (
        given
        if isinstance(given, str)
        else next((m.content for m in messages if m.role == "user"), messages[0].content)
    )


def split(rows: Sequence[Row], held_out: int | float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held out): whole groups in an order drawn from the seed are held out until there are enough rows.

    Exactly `held_out` rows (or that share) are kept; the rest of the last group is on neither side. Groups of more
    than a tenth of what is wanted come last, so that the held-out rows are not all of one kind.
    """
    wanted = held_out if isinstance(held_out, int) else round(held_out * len(rows))
    if wanted == 0:
        return list(rows), []
    sizes = Counter(row.group for row in rows)
    drawn = {group: hashlib.sha256(f"{seed}:{group}".encode()).digest() for group in sizes}
    order = sorted(sizes, key=lambda group: (sizes[group] > max(1, wanted // 10), drawn[group]))
    chosen: set[str] = set()
    count = 0
    for group in order:
        if count >= wanted:
            break
        chosen.add(group)
        count += sizes[group]
    train = [row for row in rows if row.group not in chosen]
    if count < wanted or not train:
        raise DataError(f"held_out: {wanted} rows of {len(rows)} in {len(sizes)} groups leave nothing to train on")
    return train, [row for row in rows if row.group in chosen][:wanted]


# Reading records: (where, fields) ----------------------------------------------------------------------------------


def _records(path: str, problems: list[str], network: bool) -> Iterator[tuple[str, Any]]:
    kind, colon, name = path.partition(":")
    if colon and kind == "builtin":
        if name not in BUILTIN:
            raise DataError(f"{path}: no such built-in data set. {nearest(name, BUILTIN)}")
        return ((f"{path}:{i}", row) for i, row in enumerate(BUILTIN[name](), start=1))
    if colon and kind == "hub":
        return _hub(name, network)
    file = Path(path).expanduser()
    if not file.is_file():
        siblings = [str(p) for p in file.parent.iterdir() if p.suffix in READERS] if file.parent.is_dir() else []
        what = "is a folder" if file.is_dir() else "no such file"
        raise DataError(f"{path}: {what}. {nearest(path, siblings)}")
    if file.suffix not in READERS:
        raise DataError(f"{path}: cannot read {file.suffix or 'files without an ending'}. Known: {', '.join(READERS)}")
    if file.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return READERS[file.suffix](file, problems)


def _decode(file: Path) -> str:
    """The file's text, without a byte-order mark; raises DataError with the line of the first byte that is no UTF-8."""
    raw = file.read_bytes()
    try:
        decoded = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}:{line}: byte {raw[error.start]:#04x} is not UTF-8. Convert the file, for example with "
            f"iconv -f latin1 -t utf-8"
        ) from None
    if "\0" in decoded:
        line = decoded.count("\n", 0, decoded.index("\0")) + 1
        raise DataError(
            f"{file}:{line}: the file contains NUL bytes. It may be UTF-16, or damaged: convert it to UTF-8"
        )
    return decoded


def _jsonl(file: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_decode(file).split("\n"), start=1):
        if line.strip():
            try:
                yield f"{file}:{number}", json.loads(line)
            except ValueError as error:
                problems.append(f"{file}:{number}: not valid JSON: {error}")


def _json(file: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        tree = json.loads(_decode(file))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}:{error.lineno}: not valid JSON: {error.msg}. One row a line belongs in .jsonl"
        ) from None
    if not isinstance(tree, list):
        raise DataError(f"{file}: a .json file of rows holds a list, this holds a {type(tree).__name__}")
    return ((f"{file}: row {index}", row) for index, row in enumerate(tree, start=1))


def _csv(file: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(_decode(file), newline=""), restkey="(too many)", strict=True)
    try:
        for fields in reader:
            where = f"{file}:{reader.line_num}"
            if "(too many)" in fields or None in fields.values():
                problems.append(f"{where}: has not as many columns as the header, {reader.fieldnames}")
            else:
                yield where, fields
    except csv.Error as error:
        problems.append(f"{file}:{reader.line_num}: not valid CSV: {error}")


def _parquet(file: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        table = datasets.Dataset.from_parquet(str(file), keep_in_memory=True)
    except Exception as error:
        raise DataError(f"{file}: not a readable parquet file: {error}") from None
    return ((f"{file}: row {index}", row) for index, row in enumerate(table, start=1))


def _hub(name: str, network: bool) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, part = name.partition(":")
    part = part or "train"
    config = datasets.DownloadConfig(local_files_only=not network)
    try:
        table = datasets.load_dataset(name, split=part, download_config=config)
    except Exception as error:
        hint = (
            "" if network else " It is not in the local cache, and the network is off: set `network: true` to fetch it."
        )
        raise DataError(f"hub:{name}: cannot be loaded: {error}.{hint}") from None
    return ((f"hub:{name}:{part}: row {index}", row) for index, row in enumerate(table, start=1))


READERS: dict[str, Callable[[Path, list[str]], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
