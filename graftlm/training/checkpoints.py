"""Checkpoints: a run that ends at any instant goes on as if it had not.

    OUT/checkpoints/
      unfinished.json        the recipe of a run that is not done; gone when it is
      metrics.jsonl          what every step did, a line each, as it happens
      step-00000050/
        state.safetensors    deltas, optimizer and callbacks, by name
        state.json           what of them is no tensor, and where the run and metrics.jsonl stood
        manifest.json        size and SHA-256 of the two

A checkpoint is made in a folder of another name, every file and the folder are forced to the disk, and then it gets its
name: under `step-` there is a whole one or none. Reading checks the sums; one that is damaged is named and the one
before it is taken. What a state is stands in `training/snapshot.py`. Rank 0 writes all, for deltas and optimizer are
whole on every rank, so any number of ranks can go on.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from graftlm.adapters.folder import sha256_of
from graftlm.errors import TrainingError, numbered
from graftlm.files import sync, writing
from graftlm.training.snapshot import Snapshot

FOLDER, UNFINISHED, METRICS = "checkpoints", "unfinished.json", "metrics.jsonl"
STATE, FACTS, MANIFEST = "state.safetensors", "state.json", "manifest.json"

BEST = "best"
"""The checkpoint with the lowest held-out loss, under early stopping; not one of the last that are kept."""


class Checkpoints:
    """The checkpoints of a run. `save` returns at once and writes beside the next steps, one at a time."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def save(self, snapshot: Snapshot, name: str) -> None:
        """Begin to write; raises what went wrong with the one before. OutputError where there is no room."""
        self.wait()
        self._last = self._writer.submit(self._write, snapshot, name)

    def wait(self) -> None:
        """Until the last one is on the disk; raises what went wrong with it."""
        if (last := self._last) is not None:
            self._last = None
            last.result()

    def settle(self) -> None:
        """Until nothing is being written, whatever became of it: for the way out of a run that failed."""
        with suppress(Exception):
            self.wait()
        self._writer.shutdown()

    def _write(self, snapshot: Snapshot, name: str) -> None:
        final = self.folder / name
        draft = self.folder / f".{final.name}.part"
        try:
            with writing(final, needs=snapshot.bytes):
                _remove(draft)
                draft.mkdir()
                save_file(dict(snapshot.tensors), draft / STATE)
                (draft / FACTS).write_text(json.dumps(snapshot.facts) + "\n", encoding="utf-8")
                sums = json.dumps({file: _about(draft / file) for file in (STATE, FACTS)})
                (draft / MANIFEST).write_text(f"{sums}\n{_sum(sums)}", encoding="utf-8")
                for file in (STATE, FACTS, MANIFEST):
                    sync(draft / file)
                sync(draft)
                _remove(final)  # of a run that went back behind it
                draft.rename(final)
                sync(self.folder)
        except BaseException:
            _remove(draft)
            raise
        for old in self.steps()[: -self.keep]:
            _remove(old)

    def steps(self) -> list[Path]:
        """The folders of whole checkpoints, the oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def last_facts(self) -> Mapping[str, Any]:
        """The facts of the last checkpoint, unchecked; none where there is no checkpoint that can be read."""
        for path in reversed(self.steps()):
            with suppress(OSError, ValueError):
                facts: dict[str, Any] = json.loads((path / FACTS).read_text(encoding="utf-8"))
                return facts
        return {}

    def newest(self, report: Callable[[str], None]) -> tuple[Snapshot, Path] | None:
        """The newest that is as it was written, or None; `report` is called with what is wrong with a newer one.

        Raises TrainingError where there are checkpoints and not one of them can be used.
        """
        problems = []
        for path in reversed(self.steps()):
            try:
                return read(path), path
            except DamagedCheckpointError as error:
                problems.append(str(error))
                report(f"{error}: trying the checkpoint before it")
        if problems:
            raise TrainingError(
                f"{self.folder}: no checkpoint can be used:\n{numbered(problems)}\n--overwrite starts the run anew",
                code="no-usable-checkpoint",
            )
        return None


def step_name(step: int) -> str:
    return f"step-{step:08}"


class DamagedCheckpointError(Exception):
    """A checkpoint that is not what was written: names the file."""


def read(path: Path) -> Snapshot:
    """A checkpoint from its folder; DamagedError where a file is not what was written, metrics.jsonl included."""
    try:
        sums, _, own = (path / MANIFEST).read_text(encoding="utf-8").partition("\n")
        if own != _sum(sums):
            raise DamagedCheckpointError(f"{path / MANIFEST} is damaged: its last line is not its checksum")
        sums_by_name = json.loads(sums)
        for name in (STATE, FACTS):
            if _about(path / name) != sums_by_name[name]:
                raise DamagedCheckpointError(
                    f"{path / name} is damaged: its size or checksum is not that of the manifest"
                )
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(path / STATE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        where = error.filename if isinstance(error, OSError) and error.filename else path / MANIFEST
        raise DamagedCheckpointError(f"{where} is damaged: {error}") from None
    log, where = path.parent / METRICS, facts["metrics"]
    if not log.is_file() or sha256_of(log, where["bytes"]) != where["sha256"]:
        raise DamagedCheckpointError(f"{log} is damaged: it is not what it was when {path.name} was saved")
    return Snapshot(tensors, facts)


class Metrics:
    """metrics.jsonl as it grows, from `where` a checkpoint says that it stood. `lines` are all of the run so far; what
    is not to be written is only remembered."""

    def __init__(self, file: Path, where: Mapping[str, Any] | None = None, *, writes: bool = True) -> None:
        before_bytes = b""
        if where:
            with open(file, "rb") as before:
                before_bytes = before.read(where["bytes"])
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in before_bytes.splitlines()]
        self._sum = hashlib.sha256(before_bytes)
        self._file = open(file if writes else os.devnull, "rb+" if where else "wb")  # noqa: SIM115
        if where and writes:
            self._file.truncate(len(before_bytes))
            self._file.seek(len(before_bytes))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        data = (json.dumps(line) + "\n").encode()
        self._sum.update(data)
        self._file.write(data)
        self._file.flush()

    def where(self) -> dict[str, Any]:
        """How far the file goes now, and the sum of what stands there; on the disk for good."""
        os.fsync(self._file.fileno())
        return {"bytes": self._file.tell(), "sha256": self._sum.hexdigest()}


def _remove(path: Path) -> None:
    """Delete a folder so that no half of it keeps its name: what is being deleted is called otherwise first."""
    if not path.exists():
        return
    doomed = path
    if not path.name.startswith("."):
        doomed = path.with_name(f".{path.name}.gone")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed)


def _about(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
