"""What an earlier run read, found again by what stands in the files: a second start parses no row that nobody asks for.

The key is a hash of all bytes of the files (not of their names or dates, and names only as rows say where they stand),
of what the config says of reading, splitting and mixing, the seed, and the source of this package's data code.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from graftlm.config.schema import to_tree
from graftlm.data.chat import token_cache
from graftlm.data.chat.parallel import many
from graftlm.data.sources.fields import unread_notes
from graftlm.data.sources.formats import Message
from graftlm.data.sources.messages import MESSAGE_KEYS
from graftlm.data.sources.mixing import Data, read_data
from graftlm.data.sources.parts import content_hash
from graftlm.data.sources.source import DataConfig, Row, SourceConfig
from graftlm.data.sources.splits import for_supervised

BESIDE = {"prompt_weight", "max_tokens", "over_length", "pack", "inner_rows"}
"""Keys of `data` that say nothing of which rows there are."""


class CachedRows(Sequence[Row]):
    """Rows of a cache file, parsed on first access."""

    def __init__(
        self, key: str, places: list[str], text: NDArray[np.uint8], ends: NDArray[np.int64], unread: list[str]
    ) -> None:
        self.key = key
        """What the rows follow from, but for their places."""
        self.places = places
        """Where each stands."""
        self.unread = unread
        """Notes on their keys that no reader has used."""
        self._text, self._ends = text, ends
        self._rows: list[Row | None] = [None] * len(places)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        row = self._rows[number]
        if row is None:
            begin = int(self._ends[number - 1]) if number else 0
            line = self._text[begin : self._ends[number]].tobytes()
            row = self._rows[number] = _row(self.places[number], json.loads(line.decode("utf-8", "surrogatepass")))
        return row


def places(rows: Sequence[Row]) -> list[str]:
    """Where each row stands."""
    return rows.places if isinstance(rows, CachedRows) else [row.where for row in rows]


def unread_keys(rows: Sequence[Row]) -> list[str]:
    """Notes on keys that no reader has used, a line each; a row that comes several times counts once."""
    if isinstance(rows, CachedRows):
        return rows.unread
    return unread_notes({row.where: row.unread for row in rows}.items(), MESSAGE_KEYS)


def read_cached(
    data: DataConfig,
    *,
    seed: int,
    network: bool = False,
    needs: str = "answers",
    usable: Callable[..., Any] = for_supervised,
    folder: Path | None,
) -> Data:
    """What `read_data` returns; from the folder, where the same files were read in the same way before. `needs` is what
    `usable` looks for, in a word.

    Few rows are not worth a place there, and what is no file of this machine cannot be known to be the same.
    """
    key = _key(data, seed, needs) if folder is not None else None
    if folder is None or key is None:
        return read_data(data, seed=seed, network=network, usable=usable)
    sources = [source.path for source in _sources(data)]
    file = folder / f"{hashlib.sha256(json.dumps([key, sources]).encode()).hexdigest()}.rows.safetensors"
    damaged = ""
    try:
        found = _load(file, key)
        if found is not None:
            return found
    except token_cache.DamagedCacheError as error:
        damaged = f"read anew: {file} was damaged ({error})"
    fresh = read_data(data, seed=seed, network=network, usable=usable)
    if many(fresh.train) and _save(file, fresh):
        found = _load(file, key)
        fresh = found if found is not None else fresh
    return replace(fresh, notes=[damaged, *fresh.notes]) if damaged else fresh


def _sources(data: DataConfig) -> list[SourceConfig]:
    held_out = data.held_out
    if isinstance(held_out, int | float):
        return data.sources()
    return [*data.sources(), held_out if isinstance(held_out, SourceConfig) else SourceConfig(path=held_out)]


def _key(data: DataConfig, seed: int, needs: str) -> str | None:
    """64 hexadecimal digits; None where a source is no file of this machine."""
    contents = [content_hash(source.path) for source in _sources(data)]
    if None in contents:
        return None
    settings = [{**to_tree(source), "path": None} for source in _sources(data)]
    rest = {name: value for name, value in to_tree(data).items() if name not in BESIDE | {"train"}}
    if not isinstance(data.held_out, int | float):
        rest["held_out"] = "a source"
    facts = [token_cache.code(), contents, settings, rest, seed, needs]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _save(file: Path, data: Data) -> bool:
    """Whether the rows could be kept: some files hold what JSON has no word for."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, rows in (("train", data.train), ("held_out", data.held_out)):
        lines = []
        for row in rows:
            try:
                line = json.dumps(_fields(row), ensure_ascii=False)
            except TypeError:
                return False
            if _plain(row) or _row(row.where, json.loads(line)) == row:
                lines.append(line.encode("utf-8", "surrogatepass"))
            else:
                return False
        arrays[f"{name}_text"] = np.frombuffer(b"".join(lines), np.uint8)
        arrays[f"{name}_ends"] = np.cumsum([len(line) for line in lines], dtype=np.int64)
        where = json.dumps([row.where for row in rows]).encode()
        arrays[f"{name}_places"] = np.frombuffer(where, np.uint8)
    unread = {"train": unread_keys(data.train), "held_out": unread_keys(data.held_out)}
    token_cache.save_arrays(file, arrays, {"facts": json.dumps([data.format, data.problems, data.notes, unread])})
    return True


def _load(file: Path, key: str) -> Data | None:
    found = token_cache.load_arrays(file)
    if found is None:
        return None
    arrays, facts = found
    try:
        name, problems, notes, unread = json.loads(facts["facts"])
        train, held_out = (
            CachedRows(
                f"{key} {side}",
                json.loads(arrays[f"{side}_places"].tobytes()),
                arrays[f"{side}_text"],
                arrays[f"{side}_ends"],
                unread[side],
            )
            for side in ("train", "held_out")
        )
    except (ValueError, KeyError) as error:
        raise token_cache.DamagedCacheError(f"{type(error).__name__}: {error}") from None
    return Data(train, held_out, name, problems, notes)


# Rows as JSON ------------------------------------------------------------------------------------------------------


def _fields(row: Row) -> list[Any]:
    return [
        row.group,
        _messages(row.messages),
        *(
            [
                *(row.tools, [_messages(other) for other in row.rejected], row.desirable, row.score),
                *(row.variables, row.unread, row.template),
            ]
            if _more(row)
            else ()
        ),
    ]


def _messages(messages: Sequence[Message]) -> list[Any]:
    """The role and the content; with the rest where a message has more, in the order of Message's fields."""
    return [[m.role, m.content] if m == Message(m.role, m.content) else astuple(m) for m in messages]


def _row(where: str, fields: Sequence[Any]) -> Row:
    group, messages, *more = fields
    tools, rejected, desirable, score, variables, unread, template = more or ((), (), None, None, {}, (), None)
    others = tuple(_read(other) for other in rejected)
    ignored = tuple((level, key) for level, key in unread)
    return Row(
        _read(messages),
        where,
        group,
        tuple(tools),
        others,
        desirable,
        score,
        variables,
        unread=ignored,
        template=template,
    )


def _read(messages: Sequence[Sequence[Any]]) -> list[Message]:
    found = []
    for role, text, *more in messages:
        calls, thinking, weight, spans, call_id, name, fixed = more or ((), "", None, (), "", "", ())
        spans, fixed = tuple(map(tuple, spans)), tuple(map(tuple, fixed))
        found.append(Message(role, text, tuple(calls), thinking, weight, spans, call_id, name, fixed))
    return found


def _more(row: Row) -> bool:
    some = (row.desirable, row.score, row.template)
    there = row.tools or row.rejected or row.variables or row.unread
    return bool(there) or any(value is not None for value in some)


def _plain(row: Row) -> bool:
    """Whether a row holds nothing but text and numbers, which JSON reads back unchanged."""
    return (
        not row.tools
        and not row.variables
        and not any(m.tool_calls for messages in (row.messages, *row.rejected) for m in messages)
    )
