"""Files that appear whole or not at all, and what is said where one cannot be written."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from graftlm.errors import OutputError


def check_new(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError where a file would take the place of something, before anything is computed."""
    with writing(out):
        if out.is_dir():
            raise OutputError(f"{out} is a folder: name a file in it", code="path-is-folder")
        if out.exists() and not overwrite:
            raise OutputError(
                f"{out} exists and would be lost: choose another file, or say --overwrite", code="already-exists"
            )


def check_lines(out: Path) -> None:
    """Raise OutputError where the name of a file does not say what will stand in it: JSON by the line."""
    if out.suffix != ".jsonl":
        raise OutputError(f"{out}: rows are written one a line: give a name that ends in .jsonl", code="not-jsonl")


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A draft beside `file` that takes its name when the block ends well, and is removed when it does not.

    Its folder is made where there is none. Raises OutputError as `writing` does.
    """
    draft = file.with_name(f".{file.name}.partial-{os.getpid()}")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def writing(out: Path, *, needs: int = 0) -> Iterator[None]:
    """Inside, a full disk or a place that cannot be written is an OutputError that names it; other errors pass.

    `needs` are the bytes that are to be written, if they are known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(_no_room(out, needs), code="no-space-left") from None
        place = Path(str(error.filename))  # of a file that is not there: it may be another one, which is read inside
        ours = place in (out, *out.parents) or place.name.startswith(f".{out.name}.")
        if error.errno in _NO_PLACE or (error.errno == errno.ENOENT and ours):
            raise OutputError(f"{out}: cannot be written: {error.strerror}", code="not-writable") from None
        raise
    except SafetensorError as error:  # how safetensors reports a full disk
        if "No space left" in str(error):
            raise OutputError(_no_room(out, needs), code="no-space-left") from None
        raise


_NO_PLACE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _no_room(out: Path, needs: int) -> str:
    there = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    sizes = f"it takes {needs:,} bytes, and {free:,}" if needs else f"{free:,} bytes"
    return f"{out}: no room on the disk ({sizes} are free). Nothing that was there is lost: make some room"


def cache_folder() -> Path:
    """Where converted bases and fingerprints are kept: $GRAFT_CACHE, or graftlm in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graftlm"
    return Path(os.environ.get("GRAFT_CACHE") or default)
