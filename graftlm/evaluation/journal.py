"""The journal of an evaluation: what was found of each item, a line each, so that a run that was killed goes on.

    {"graftlm": "0.1.0", "digest": "sha256:..."}                        # what is measured, and by which models
    {"task": "capitals", "item": 0, "found": {"base": [{"text": ...}]}} # one entry for each template

Items are asked in chunks, and a chunk is written when all of it is there. What a chunk's answers are depends on that
chunk alone, so a run that goes on finds what an uninterrupted one would have found, to the bit.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm import __version__
from graftlm.errors import OutputError
from graftlm.files import sync, writing

Entry = Mapping[str, Sequence[Mapping[str, Any]]]
"""Model -> what was found for each template."""


class Journal:
    """Entries by (task, number of the item); kept in a file where there is one."""

    def __init__(self, file: Path | None, digest: str, *, replace: bool = False) -> None:
        """Read what is there. Raises OutputError for a journal of another evaluation, unless it is to be replaced, and
        for what is none."""
        self.file, self.entries = file, dict[tuple[str, int], Entry]()
        if file is None:
            return
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file() and file.stat().st_size:
                self._read(file, digest, replace)
            if not file.is_file() or not file.stat().st_size:
                self._append([{"graftlm": __version__, "digest": digest}])

    def write(self, entries: Mapping[tuple[str, int], Entry]) -> None:
        """Add entries, which are on the disk when this returns."""
        self.entries.update(entries)
        self._append([{"task": task, "item": item, "found": found} for (task, item), found in entries.items()])

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if self.file is None:
            return
        with writing(self.file), open(self.file, "a", encoding="utf-8") as out:
            out.write("".join(json.dumps(line) + "\n" for line in lines))
            out.flush()
            os.fsync(out.fileno())
        sync(self.file.parent)

    def _read(self, file: Path, digest: str, replace: bool) -> None:
        """A last line that was cut off is removed from the file."""
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with open(file, "r+b") as out:
                out.truncate(len(whole))
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()] or [{"digest": digest}]
            found = {(line["task"], line["item"]): line["found"] for line in lines}
            there = first["digest"]
        except (ValueError, KeyError, TypeError):
            raise OutputError(
                f"{file}: is no journal of an evaluation: move it away, or choose another name", code="not-a-journal"
            ) from None
        if there != digest and replace:
            file.write_bytes(b"")
            return
        if there != digest:
            raise OutputError(
                f"{file}: is the journal of another evaluation (other tasks, rows, models or settings): remove it to "
                "begin anew, say --overwrite, or choose another name",
                code="other-evaluation",
            )
        self.entries = found
