"""What graftlm has written into its cache folder: list it, remove it. Everything in it can be made again."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from graftlm.files import cache_folder, writing

_HASH = "[0-9a-f]{12,64}"


class Kind(NamedTuple):
    """A subfolder of the cache, named as the kind."""

    holds: str
    pattern: str
    """Names of what graftlm writes there; anything else is not ours, and is left alone."""


KINDS = {
    "bases": Kind("bases converted from .gguf files", rf".+-{_HASH}"),
    "fingerprints": Kind("checksums of bases", rf"{_HASH}\.json"),
    "kernels": Kind(
        "C++ kernels built for this processor, and what was timed to choose kernels",
        rf"{_HASH}(\.{_HASH})?\.so|timings-{_HASH}\.json",
    ),
    "rows": Kind("rows read and rendered to token ids", rf"{_HASH}(\.rows)?\.safetensors"),
    "scores": Kind("scores of rows, by selectors", rf"{_HASH}\.jsonl"),
}

_DRAFT = re.compile(r".+\.partial-\d+")
_DRAFT_AGE_S = 3600
"""A draft that is younger may belong to a process that is writing it now."""


class CacheEntry(NamedTuple):
    kind: str
    path: Path
    bytes: int
    modified: float
    """Seconds since 1970."""


def entries(kinds: tuple[str, ...] = tuple(KINDS)) -> list[CacheEntry]:
    """What graftlm has written into the cache folder, of these kinds. Links are not followed and not listed."""
    return [_entry(kind, path) for kind in kinds for path in _paths(kind) if _is_ours(kind, path)]


def others() -> list[Path]:
    """What lies in the cache folder and was not written by graftlm, links included. `clear` leaves it alone."""
    root = cache_folder()
    if not root.is_dir():
        return []
    top = [path for path in sorted(root.iterdir()) if path.name not in KINDS or path.is_symlink() or not path.is_dir()]
    return top + [path for kind in KINDS for path in _paths(kind) if not _is_ours(kind, path) and not _is_draft(path)]


def clear(found: list[CacheEntry]) -> None:
    """Remove these entries. Raises OutputError for one that cannot be removed."""
    for entry in found:
        assert _is_ours(entry.kind, entry.path)
        with writing(entry.path):
            if entry.path.is_dir():
                shutil.rmtree(entry.path)  # removes links in it, not what they lead to
            else:
                entry.path.unlink(missing_ok=True)


def _paths(kind: str) -> Iterator[Path]:
    folder = cache_folder() / kind
    if folder.is_dir() and not folder.is_symlink():
        yield from sorted(folder.iterdir())


def _is_ours(kind: str, path: Path) -> bool:
    if path.is_symlink() or path.is_dir() != (kind == "bases"):
        return False
    if _is_draft(path):
        return path.lstat().st_mtime < time.time() - _DRAFT_AGE_S
    return re.fullmatch(KINDS[kind].pattern, path.name) is not None


def _is_draft(path: Path) -> bool:
    return _DRAFT.fullmatch(path.name) is not None


def _entry(kind: str, path: Path) -> CacheEntry:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    about = [file.lstat() for file in files]
    return CacheEntry(kind, path, sum(each.st_size for each in about), max(each.st_mtime for each in about))
