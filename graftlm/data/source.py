"""Where rows come from, and which of them are held out.

Files are read strictly and in one pass: every row that cannot be used is reported as `file:line: reason`.
"""

import codecs
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftlm.config import Count, Flag, PositiveCount, Share, Weight, config
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
    mask: Literal["response", "last-turn", "instruction", "no-boilerplate", "everything"] = "response"
    prompt_weight: Weight = 0.0
    """The weight, from 0 to 1, of tokens that the mask leaves out."""
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
    tools: tuple[dict[str, Any], ...] = ()
    """What an assistant could call: functions with a JSON schema, as OpenAI has them."""


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
    if given is None or given == "":
        return next((m.content for m in messages if m.role == "user"), messages[0].content)
    return str(given)


def split(rows: Sequence[Row], held_out: int | float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held out): whole groups in an order drawn from the seed are held out until there are enough rows.

    Exactly `held_out` rows (or that share, and then at least one) are kept; chosen rows that are too many are on
    neither side. Groups of more than a tenth of what is wanted come last, so that the held-out rows are not all of one
    kind.
    """
    wanted = held_out if isinstance(held_out, int) else max(1, round(held_out * len(rows))) if held_out else 0
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
        raise DataError(
            f"held_out: {wanted} of {len(rows)} rows in {len(sizes)} groups leave nothing to train on: hold out fewer, "
            "or make smaller groups (a row's `group`, or else its first question, is never on both sides)"
        )
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
        folder = file if file.is_dir() else file.parent
        siblings = [str(p) for p in folder.iterdir() if p.suffix in READERS] if folder.is_dir() else []
        what = "is a folder, a file of rows is needed" if file.is_dir() else "no such file"
        raise DataError(f"{path}: {what}. {nearest(path, siblings)}")
    if file.suffix not in READERS:
        raise DataError(f"{path}: cannot read {file.suffix or 'files without an ending'}. Known: {', '.join(READERS)}")
    if file.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return READERS[file.suffix](file, problems)


def _decode(file: Path) -> str:
    """The file's text, without a byte-order mark; raises DataError with the line of the first byte that is no UTF-8."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        decoded = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}:{line}: byte {error.object[error.start]:#04x} is not UTF-8. Convert the file, for example with "
            f"iconv -f {guess} -t utf-8"
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
            except (ValueError, RecursionError) as error:
                problems.append(f"{file}:{number}: not valid JSON: {error}")


def _json(file: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        tree = json.loads(_decode(file))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}:{error.lineno}: not valid JSON: {error.msg}. One row a line belongs in .jsonl"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(tree, list):
        raise DataError(f"{file}: a .json file of rows holds a list, this holds a {type(tree).__name__}")
    return ((f"{file}: row {index}", row) for index, row in enumerate(tree, start=1))


def _csv(file: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(_decode(file), newline=""), strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # the limit of 128 KiB would refuse a long document
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{file}:1: two columns have the same name: {header}")
        line = reader.line_num + 1  # where a row begins; with line breaks in quotes it ends further down
        for cells in reader:
            if len(cells) == len(header):
                yield f"{file}:{line}", dict(zip(header, cells, strict=True))
            elif cells:
                problems.append(f"{file}:{line}: has {len(cells)} columns, the header has {len(header)}: {header}")
            line = reader.line_num + 1
    except csv.Error as error:
        problems.append(f"{file}:{reader.line_num}: not valid CSV: {error}. The rows after it were not read")
    finally:
        csv.field_size_limit(limit)


def _parquet(file: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet  # type: ignore[import-untyped] # comes with datasets, whose own reader fills a cache

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except Exception as error:
        raise DataError(f"{file}: not a readable parquet file: {error}") from None
    return ((f"{file}: row {index}", row) for index, row in enumerate(rows, start=1))


def _hub(name: str, network: bool) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, part = name.partition(":")
    part = part or "train"
    try:
        with nullcontext() if network else _offline():
            table = datasets.load_dataset(name, split=part)
    except Exception as error:
        off = "" if network else " It is not in the local cache, and the network is off: `network: true` fetches it."
        raise DataError(f"hub:{name}: cannot be loaded: {error}.{off}") from None
    return ((f"hub:{name}:{part}: row {index}", row) for index, row in enumerate(table, start=1))


@contextmanager
def _offline() -> Iterator[None]:
    """Inside, the hub's libraries make no request: their own arguments leave some that are made all the same."""
    import datasets.config
    import huggingface_hub.constants

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


READERS: dict[str, Callable[[Path, list[str]], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
