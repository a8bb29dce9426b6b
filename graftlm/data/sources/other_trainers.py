"""Data sets as other trainers describe them: what `llama_factory.py` and `axolotl.py` share.

Each entry of a description becomes a Part: a file, a format of ours, and a function that renames its fields. What an
entry says and we do not know or cannot honour is an error that names it; nothing that it says is passed over.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.data.sources.messages import Fields, missing
from graftlm.errors import DataError, nearest


def as_it_is(row: Fields) -> Fields:
    """The row itself, where its fields have our names already."""
    return row


@dataclass(frozen=True)
class Part:
    """One file of rows, and how to read it."""

    path: str
    format: str = "auto"
    reshape: Callable[[Fields], Fields] = as_it_is
    notes: tuple[str, ...] = ()
    """Settings of its description that are not used here and that a user may miss."""


def only(entry: Mapping[str, Any], known: Sequence[str], cannot: Mapping[str, str], where: str) -> None:
    """Raise DataError for a key that is not known, or that is and says more than we can do."""
    for key, value in entry.items():
        if key in cannot and value not in (None, False, "", []):
            raise DataError(
                f"{where}: {key}: {value!r:.60} cannot be honoured: {cannot[key]}", code="unsupported-setting"
            )
        if key not in known and key not in cannot:
            raise DataError(f"{where}: {key}: unknown key. {nearest(key, [*known, *cannot])}", code="unknown-key")


def column(row: Fields, name: str) -> Any:
    """What stands in a field that a description names; RowError where a row has no such field."""
    if name not in row:
        raise missing(row, name)
    return row[name]


def on_hub(name: str, subset: str | None, split: str) -> str:
    """The path of a data set of the hub."""
    return f"hub:{name}{'@' + subset if subset else ''}:{split}"
