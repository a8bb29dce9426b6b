"""Files -> records: what stands in a file, one row at a time, and what of it cannot be read.

Damage is met row by row: a byte that is no UTF-8, a line that is cut off or a key that is given twice costs that row
and no other. Only where a file as a whole is not what its ending says is there a DataError. A .json file is one value,
so it is held whole; the others are read as they come, at bounded memory.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from graftlm.data.sources import docstrings
from graftlm.data.sources.nulls import without_nulls
from graftlm.data.sources.tasks import table as tasks
from graftlm.errors import DataError, nearest


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row, and whether the row was left out for it or only is to be told."""

    where: str
    reason: str
    left_out: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


Record = tuple[str, Any]  # where it stands, and what stands there


class Builtin(NamedTuple):
    """A built-in data set."""

    rows: Callable[[], list[dict[str, str]]]
    files: Callable[[], list[Path]]
    """The files of this machine that the rows are made from."""


BUILTIN = {
    "docstrings": Builtin(docstrings.rows, docstrings.files),
    "tasks": Builtin(tasks.every_row, tasks.files),
    **{f"tasks/{name}": Builtin(partial(tasks.rows, name), tasks.files) for name in tasks.TASKS},
}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
GZ = ".gz"
GZIP = b"\x1f\x8b"
"""The first bytes of a gzip file."""
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
JSONL = ".jsonl"
TABLES = (".parquet", ".arrow")
"""Files of columns, which have their own way to pack them."""
NOT_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files that `datasets.save_to_disk` and LLaMA-Factory put beside rows."""
NUL = "\udc00"
"""In text from a .csv file a byte of zero, which Python's csv cannot read; other odd bytes are U+DC80 to U+DCFF."""


def records(path: str, *, network: bool = False) -> Iterator[Record | Problem]:
    """The records of a file, of `hub:org/name[@subset][:split]` or of `builtin:NAME`, in order; raises DataError where
    there are none to be had."""
    kind, colon, name = path.partition(":")
    if colon and kind == "builtin":
        if name not in BUILTIN:
            raise DataError(f"{path}: no such built-in data set. {nearest(name, BUILTIN)}", code="no-such-data-set")
        return ((f"{path}:{i}", row) for i, row in enumerate(BUILTIN[name].rows(), start=1))
    if colon and kind == "hub":
        return _hub(name, network)
    file = Path(path).expanduser()
    if not file.is_file():
        siblings = [str(p) for p in file.parent.iterdir() if _ending(p) in READERS] if file.parent.is_dir() else []
        raise DataError(f"{path}: no such file. {nearest(path, siblings)}", code="no-such-file")
    ending = _ending(file)
    if ending not in READERS or (ending in TABLES and file.suffix.lower() == GZ):
        what = "is packed: unpack it first" if file.suffix.lower() in PACKED else ""
        what = what or f"cannot read {file.suffix or 'files without an ending'}"
        raise DataError(
            f"{path}: {what}. Known: {', '.join(READERS)}, also packed as {JSONL}{GZ}", code="unsupported-file-type"
        )
    try:
        with _open(file) as stream:
            head = stream.read(4096)
    except GZIP_ERRORS as error:
        raise _damaged(file, error) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}", code="unreadable-file") from None
    if not head:
        raise DataError(f"{path}: the file is empty", code="empty-file")
    if head.startswith(GZIP):
        raise DataError(
            f"{path}: is packed by gzip, whatever its name says: unpack it first (gunzip)", code="hidden-gzip"
        )
    if ending not in TABLES and (
        head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 4 * head.count(0) > len(head) > 8
    ):
        raise DataError(
            f"{file}:1: the file contains NUL bytes, as UTF-16 does, and is not UTF-8. Convert it, for example with "
            "iconv -f utf-16 -t utf-8",
            code="not-utf-8",
        )
    found = READERS[ending](file)
    return _unpacked(file, found) if file.suffix.lower() == GZ else found


def expanded(path: str) -> list[str]:
    """The files that a path stands for, by name: those that a pattern (`data/*.jsonl`) matches, those of a folder that
    can be read, or the path itself. DataError where there are none."""
    if path.startswith(tuple(f"{kind}:" for kind in ("hub", "builtin"))):
        return [path]
    file = Path(path).expanduser()
    if file.is_dir():
        found = [p for p in file.iterdir() if p.is_file() and _ending(p) in READERS and p.name not in NOT_ROWS]
        what = f"no file of rows in this folder. Known: {', '.join(READERS)}"
    elif glob.has_magic(path) and not file.exists():
        found = [p for p in map(Path, glob.glob(str(file), recursive=True)) if p.is_file()]
        what = "no file matches"
    else:
        return [path]
    if not found:
        raise DataError(f"{path}: {what}", code="no-such-file")
    return [str(p) for p in sorted(found)]


def _ending(file: Path) -> str:
    """What decides how a file is read, in small letters; a .gz behind it says how it is packed."""
    name = Path(file.stem) if file.suffix.lower() == GZ else file
    return name.suffix.lower()


def _open(file: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where its name says that gzip has packed it."""
    return cast(IO[bytes], gzip.open(file, "rb")) if file.suffix.lower() == GZ else file.open("rb")


def _unpacked(file: Path, found: Iterator[Record | Problem]) -> Iterator[Record | Problem]:
    try:
        yield from found
    except GZIP_ERRORS as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: damaged: what gzip has packed cannot be unpacked whole: {error}", code="damaged-file")


def files(path: str) -> list[Path]:
    """The files of this machine that the records of a source are made from; some may not be there."""
    kind, _, name = path.partition(":")
    return BUILTIN[name].files() if kind == "builtin" and name in BUILTIN else [Path(path).expanduser()]


# JSON --------------------------------------------------------------------------------------------------------------


class _Refused(ValueError):
    """JSON that Python would read, and lose something on the way."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Refused(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is given twice in one object")
    return found


def _constant(name: str) -> Any:
    raise _Refused(f"{name} is no JSON value: write null, or leave the field out")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
_LENIENT = json.JSONDecoder()


def _json_reason(error: Exception, text: str) -> str:
    """What is wrong with a line of JSON."""
    if isinstance(error, RecursionError):
        return "not valid JSON: it is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())
    end = ": the line ends in the middle of a value, it is cut off" if is_cut else ""
    return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}{end}"


def _jsonl(file: Path) -> Iterator[Record | Problem]:
    with _open(file) as stream:
        for number, raw in enumerate(stream, start=1):
            where = f"{file}:{number}"
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                yield Problem(where, "the line is blank", left_out=False)
                continue
            if b"\0" in raw:
                yield Problem(where, f"the line contains NUL bytes (the first is byte {raw.index(0) + 1}): damaged")
                continue
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                yield Problem(where, _not_utf8(raw[error.start]))
                continue
            try:
                record = _STRICT.decode(text)
            except (ValueError, RecursionError) as error:
                if number == 1 and (text.strip() == "[" or text.lstrip().startswith("[{")):
                    raise DataError(
                        f"{where}: the file is one JSON list, and a .jsonl file holds a row a line: rename it to "
                        f"{file.stem}.json",
                        code="json-list-in-jsonl",
                    ) from None
                yield Problem(where, _json_reason(error, text))
                continue
            yield where, record


def _not_utf8(byte: int) -> str:
    return f"byte {byte:#04x} is not UTF-8. Convert the file, for example with iconv -f latin1 -t utf-8"


def _json(file: Path) -> Iterator[Record | Problem]:
    """The elements of a list, each read by itself, with the line on which it begins; or JSON by the line."""
    with _open(file) as stream:
        text = stream.read().decode("utf-8-sig", "surrogateescape")
    odd_bytes = not text.isascii() and any("\udc80" <= c <= "\udcff" for c in set(text))
    skip = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    place = skip(text, 0).end()
    if not text.startswith("[", place):
        end = len(text)
        with suppress(ValueError, RecursionError):
            _, end = _LENIENT.raw_decode(text, place)
        several = text[end:].strip()  # then it is JSON by the line, whatever its ending
        yield from _jsonl(file) if several else _json_object(file, text)
        return
    place = skip(text, place + 1).end()
    line, position, number = 1, 0, 0
    while not text.startswith("]", place):
        line, position, number = line + text.count("\n", position, place), place, number + 1
        where = f"{file}:{line}: row {number}"
        try:
            found: Record | Problem
            try:
                value, end = _STRICT.raw_decode(text, place)
                found = where, value
            except _Refused as error:
                value, end = _LENIENT.raw_decode(text, place)
                found = Problem(where, str(error))
            if odd_bytes and (byte := next((c for c in text[place:end] if "\udc80" <= c <= "\udcff"), "")):
                found = Problem(where, _not_utf8(ord(byte) - 0xDC00))
            yield found
            place = skip(text, end).end()
            comma = text.startswith(",", place)
            place = skip(text, place + comma).end()
            if comma == text.startswith("]", place):
                raise json.JSONDecodeError("Expecting a value" if comma else "Expecting ',' or ']'", text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            why = (
                error.msg.removesuffix(" at") if isinstance(error, json.JSONDecodeError) else "it is nested too deeply"
            )
            yield Problem(f"{file}:{at}", f"not valid JSON: {why}. What follows was not read")
            return
    if text[place + 1 :].strip():
        last = text.count("\n") + 1
        yield Problem(f"{file}:{last}", "there is more after the end of the list, which was not read")


def _json_object(file: Path, text: str) -> Iterator[Record]:
    """A file that is one mapping: a task of Super-NaturalInstructions is a row of many instances."""
    try:
        tree = _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not valid JSON: {error.msg}", code="invalid-json") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON: {error}", code="invalid-json") from None
    if isinstance(tree, dict) and "Instances" in tree:
        yield str(file), tree
        return
    described = [name for name, entry in tree.items() if isinstance(entry, dict)] if isinstance(tree, dict) else []
    near = f". If it describes data sets, write {file}:NAME. {nearest('', described)}" if described else ""
    listed = [name for name, entry in tree.items() if isinstance(entry, list)] if isinstance(tree, dict) else []
    near = near or (f". If its rows are {listed[0]!r}, write that list alone into a file" if listed else "")
    raise DataError(
        f"{file}: a .json file of rows holds a list, this holds a {type(tree).__name__}{near}", code="not-a-list"
    )


# Tables ------------------------------------------------------------------------------------------------------------


def _csv(file: Path, delimiter: str = ",") -> Iterator[Record | Problem]:
    """Rows by the names in the header, all of them text; a row is named by the line on which it begins."""
    limit = csv.field_size_limit(2**31 - 1)  # the limit of 128 KiB would refuse a long document
    try:
        with io.TextIOWrapper(_open(file), "utf-8-sig", "surrogateescape", newline="") as stream:
            reader = csv.reader((line.replace("\0", NUL) for line in stream), strict=True, delimiter=delimiter)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{file}:1: two columns have the same name: {header}", code="duplicate-columns")
            if len(header) == 1 and any(separator in header[0] for separator in ";,\t|" if separator != delimiter):
                other = "tabs" if delimiter == "\t" else "commas (in .tsv files by tabs)"
                raise DataError(
                    f"{file}:1: the header is one column, {header[0]!r}: columns are separated by {other}",
                    code="wrong-delimiter",
                )
            while True:
                where = f"{file}:{reader.line_num + 1}"
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    end = reader.line_num
                    yield Problem(where, f"not valid CSV: {error} in line {end}. What stands before that is left out")
                    continue
                odd = next((c for cell in cells if not cell.isascii() for c in cell if NUL <= c <= "\udcff"), "")
                if not cells:
                    yield Problem(where, "the line is blank", left_out=False)
                elif odd:
                    yield Problem(where, "contains a NUL byte: damaged" if odd == NUL else _not_utf8(ord(odd) - 0xDC00))
                elif len(cells) != len(header):
                    yield Problem(where, f"has {len(cells)} columns, the header has {len(header)}: {header}")
                else:
                    yield where, dict(zip(header, cells, strict=True))
    finally:
        csv.field_size_limit(limit)


def _table(file: Path, batches_of: Callable[[Path], Iterator[Any]]) -> Iterator[Record | Problem]:
    """The rows of a file of columns, which is read in batches of pyarrow."""
    number = 0
    try:
        for batch in batches_of(file):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", _of_a_table(row)
    except Exception as error:
        after = f" (after row {number})" if number else ""
        raise DataError(
            f"{file}: not a readable {_ending(file)[1:]} file: {error}{after}", code="damaged-file"
        ) from None


def _parquet_batches(file: Path) -> Iterator[Any]:
    import pyarrow.parquet  # type: ignore[import-untyped] # comes with datasets, whose own reader fills a cache

    with pyarrow.parquet.ParquetFile(file) as table:
        yield from table.iter_batches(1000)


def _arrow_batches(file: Path) -> Iterator[Any]:
    """The record batches of a file of `datasets.save_to_disk` or of Arrow's own format."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as stream:
        try:
            batches = iter(pyarrow.ipc.open_stream(stream))
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(stream)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        yield from batches


def _of_a_table(row: Any) -> Any:
    """The row without what only its table put into it: mappings of one column all have the same keys there, so one that
    lacks a key (an argument of a call, say) has it with null."""
    return {name: without_nulls(value) for name, value in row.items()}


def _hub(name: str, network: bool) -> Iterator[Record | Problem]:
    import datasets

    name, _, part = name.partition(":")
    part = part or "train"
    at, _, subset = name.partition("@")
    try:
        with nullcontext() if network else _offline():
            table = datasets.load_dataset(at, subset or None, split=part)
    except Exception as error:
        off = "" if network else " It is not in the local cache, and the network is off: `network: true` fetches it."
        raise DataError(f"hub:{name}: cannot be loaded: {error}.{off}", code="hub-data-unavailable") from None
    return ((f"hub:{name}:{part}: row {index}", _of_a_table(row)) for index, row in enumerate(table, start=1))


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


READERS: dict[str, Callable[[Path], Iterator[Record | Problem]]] = {
    JSONL: _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": partial(_table, batches_of=_parquet_batches),
    ".arrow": partial(_table, batches_of=_arrow_batches),
}
