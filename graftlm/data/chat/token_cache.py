"""Rendered rows on disk, addressed by all that they follow from: a changed template never meets old tokens.

The key is a hash of the rows' messages and tools, the chat template, the tokenizer, what the config says of masks, the
source of this package's data code and the versions of what it stands on. Nothing is ever looked up by a file's name or
date. A value is a safetensors file of columns with a checksum; it is mapped into memory, not read.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cache
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from graftlm.data.chat.render import Renderer
from graftlm.data.chat.token_columns import Columns
from graftlm.data.sources.formats import Message
from graftlm.data.sources.source import DataConfig, Row
from graftlm.errors import OutputError
from graftlm.files import whole

MOST_BYTES = 8 * 2**30
"""Largest size of the folder; beyond it the least recently used files are deleted."""

BESIDE = {
    *("train", "mix_temperature", "order", "desirable_share", "held_out"),
    *("strict", "max_tokens", "over_length", "pack"),
}
"""Keys of `data` that change no token and no weight of a whole row. Any other key, a new one too, is in the hash."""

AT_ONCE = 1_000
_REST = [f for f in fields(Message) if f.name not in ("role", "content")]
_rest = attrgetter(*(f.name for f in _REST))
_PLAIN = tuple(f.default for f in _REST)
_TYPES = {"I32": np.int32, "I64": np.int64, "U8": np.uint8, "F32": np.float32, "BOOL": np.bool_}


class DamagedCacheError(Exception):
    """A file of the cache that is not what was written."""


def key(rows: Sequence[Row], renderer: Renderer, data: DataConfig) -> str:
    """64 hexadecimal digits: the SHA-256 of everything that ids, roles and weights follow from."""
    tokenizer, row_key = renderer.tokenizer, getattr(rows, "key", None)
    template = renderer.template or ""
    digest = hashlib.sha256()
    for part in (
        code(),
        template,
        str(renderer.today) if renderer.writes_the_date else "",
        renderer.turn_order,
        tokenizer.backend_tokenizer.to_str(),
        type(tokenizer).__name__,
        repr(sorted(tokenizer.special_tokens_map.items())),
        repr(sorted((i, repr(token)) for i, token in tokenizer.added_tokens_decoder.items())),
        repr(sorted((name, value) for name, value in asdict(data).items() if name not in BESIDE)),
    ):
        _add(digest, part)
    if row_key is not None:  # rows that are known by what they were read from
        _add(digest, row_key)
        return digest.hexdigest()
    for start in range(0, len(rows), AT_ONCE):
        _add(digest, "".join(part for row in rows[start : start + AT_ONCE] for part in _parts(row)))
    return digest.hexdigest()


def _parts(row: Row) -> Iterator[str]:
    """All that a row says, such that no two rows say the same; json for what few rows have, as it is slow."""
    for message in row.messages:
        yield f"{message.role}:{len(message.content)}:"
        yield message.content
        if (rest := _rest(message)) != _PLAIN:
            yield json.dumps(rest, default=dict)
    yield f";{json.dumps(row.tools, default=dict)}" if row.tools else ";"
    if row.variables:
        yield json.dumps(row.variables, sort_keys=True, default=dict)


def _add(digest: Any, text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    digest.update(f"{len(raw)}:".encode())
    digest.update(raw)


@cache
def code() -> str:
    """The source of the data code, and what else decides on tokens."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    versions = [f"{name} {version(name)}" for name in ("tokenizers", "transformers", "jinja2")]
    return "\n".join([*versions, *(file.read_text(encoding="utf-8") for file in files)])


def save(file: Path, columns: Columns) -> None:
    """Write the columns, whole or not at all. A folder that cannot be written to costs time later and is no error."""
    save_arrays(file, _arrays(columns), {"problems": json.dumps(columns.problems)})


def save_arrays(file: Path, arrays: dict[str, NDArray[Any]], facts: dict[str, str]) -> None:
    arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    facts = {**facts, "crc": _checksum(arrays)}
    with suppress(OSError, OutputError):
        with whole(file) as draft:
            save_file(arrays, draft, metadata=facts)
        _make_room(file.parent)


def load(file: Path) -> Columns | None:
    """The columns there; None where there is no file. Raises DamagedError where it is not what was written."""
    found = load_arrays(file)
    if found is None:
        return None
    arrays, facts = found
    try:
        problems = {int(number): why for number, why in json.loads(facts["problems"]).items()}
        return Columns(**arrays, problems=problems)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCacheError(f"{type(error).__name__}: {error}") from None


def load_arrays(file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]] | None:
    """What `save_arrays` wrote, mapped into memory (writable, but nothing reaches the file); None where there is none.

    Raises DamagedError where the file is not what was written.
    """
    try:
        mapped = np.memmap(file, np.uint8, "c")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise DamagedCacheError(str(error)) from None
    with suppress(OSError):
        os.utime(file)  # used now: the last to go
    try:
        begin = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        header = json.loads(mapped[8:begin].tobytes())
        facts = header.pop("__metadata__")
        tokens = mapped.view(np.ndarray)[begin:]
        arrays = {
            name: tokens[slice(*entry["data_offsets"])].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
        }
        if _checksum(arrays) != facts["crc"]:
            raise DamagedCacheError("its checksum is another")
        return arrays, facts
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCacheError(f"{type(error).__name__}: {error}") from None


def _arrays(columns: Columns) -> dict[str, NDArray[Any]]:
    return {name: value for name, value in vars(columns).items() if name != "problems"}


def _checksum(arrays: dict[str, NDArray[Any]]) -> str:
    """CRC-32 of each array by its name: quick enough to read 100 million tokens in a second."""
    sums = {name: zlib.crc32(arrays[name].view(np.uint8)) for name in sorted(arrays)}  # type: ignore[arg-type]
    return " ".join(f"{name} {crc:08x}" for name, crc in sums.items())


def _make_room(folder: Path) -> None:
    files = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in folder.iterdir()), reverse=True)
    room = MOST_BYTES
    for place, (_, size, file) in enumerate(files):
        room -= size
        if room < 0 and place > 0:  # never the one that was just written
            file.unlink(missing_ok=True)
