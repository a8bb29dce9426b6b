"""Where a run lives: what stands in OUT before it, while it goes on and after it, and whether it may be resumed."""

import datetime
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftlm import distributed
from graftlm.adapters.folder import RECIPE, SUMMARY, check_new_folder, mend_folder
from graftlm.config.trees import Tree, differences
from graftlm.data.sources.source import DataConfig
from graftlm.errors import OutputError, TrainingError, numbered
from graftlm.files import sync, whole, writing
from graftlm.lock import only_writer
from graftlm.training import dependencies, trackers
from graftlm.training.checkpoints import (
    BEST,
    FOLDER,
    METRICS,
    UNFINISHED,
    Checkpoints,
    DamagedCheckpointError,
    Metrics,
    read,
)
from graftlm.training.snapshot import Snapshot

KEPT = (FOLDER, trackers.FOLDER)
"""What in OUT belongs to the run, not to the adapter, and stays when the adapter is written."""

FREE = (
    "network", "report.", "train.compile", "train.keep", "train.kernels", "train.on_nonfinite", "train.save_every",
    "train.threads",
)  # fmt: skip
"""Keys of a recipe that say nothing of what is learnt: a run may be resumed with others. (Other threads or kernels
round otherwise, so the last bits of a resumed run are then not those of an unbroken one. `train.compile` was the name
of `train.kernels`.)"""


@dataclass
class RunHandle:
    """A run that is on its way: where its steps are noted and its checkpoints go."""

    metrics: Metrics
    checkpoints: Checkpoints | None
    track: Callable[[Mapping[str, Any]], Sequence[dict[str, Any]]] = lambda line: ()
    """Called with every line; returns lines of its own."""

    def log(self, line: dict[str, Any]) -> None:
        """A line for metrics.jsonl and for the trackers."""
        self.metrics.write(line)
        for more in self.track(line):
            self.metrics.write(more)

    def save(self, name: str, snapshot: Callable[..., Snapshot]) -> None:
        """Save what `snapshot(metrics=...)` takes under this name, on the rank that writes."""
        if self.checkpoints is not None:
            self.checkpoints.save(snapshot(metrics=self.metrics.where()), name)


class RunFolder:
    """The folder OUT of a run."""

    def __init__(self, out: Path, recipe: Tree, data: DataConfig, read: Callable[[Path], Tree], *, keep: int) -> None:
        """`recipe` is the tree of the run's recipe, `data` its section data, and `read` reads such a tree from a file.
        The last `keep` checkpoints are kept."""
        self.out, self.tree, self.data, self.read = out, recipe, data, read
        self.folder = out / FOLDER
        self.checkpoints = Checkpoints(self.folder, keep=keep)
        self.resumes = self.changed = False
        self.began = datetime.datetime.now().isoformat(timespec="seconds")
        """When the run began, by the local clock: of one that goes on, when its first process started."""

    def open(
        self, *, overwrite: bool, resume: bool, accept_changes: bool, report: Callable[[str], None]
    ) -> Literal["new", "finished", "unfinished"]:
        """Look at what is there. Raises OutputError where something would be lost, or is of another recipe."""
        if distributed.first():
            mend_folder(self.out, keep=KEPT)
        unfinished = (self.folder / UNFINISHED).is_file()
        if not resume:
            if unfinished and not overwrite:
                raise OutputError(
                    f"{self.out} holds a run that is not done: say --resume to go on, or --overwrite",
                    code="unfinished-run",
                )
            check_new_folder(self.out, overwrite=overwrite, keep=KEPT)
            return "new"
        if unfinished:
            began = json.loads((self.folder / UNFINISHED).read_text(encoding="utf-8"))
        elif (self.out / SUMMARY).is_file():
            began = self.read(self.out / RECIPE)
        else:
            check_new_folder(self.out, overwrite=overwrite or not self._holds_an_adapter(), keep=KEPT)
            return "new"
        self._check_version(began)
        if saved := self.checkpoints.last_facts():
            self.began = saved.get("began", self.began)
            moved = dependencies.with_moved_paths(began, self.tree, saved, self.data)
            began = moved if unfinished else {**moved, "base": began["base"]}  # nobody will look at that base
        changes = differences(began, self.tree)
        if changes:
            report(f"{self.out} was begun with another recipe:\n{numbered(changes)}")
        matter = any(map(matters, changes))
        if matter and not accept_changes:
            raise OutputError(
                f"{self.out} was begun with another recipe:\n{numbered(changes)}\nChange it back, or say "
                "--accept-changes to go on with the new one, or --overwrite without --resume to start anew",
                code="other-recipe",
            )
        self.resumes, self.changed = unfinished or matter, matter
        return "unfinished" if self.resumes else "finished"

    def _check_version(self, began: Tree) -> None:
        """Raise OutputError where a run has recipe keys that there are no more: a version that knows them began it."""
        sections = [("", began, self.tree)] + [
            (f"{key}.", began[key], self.tree[key])
            for key in ("base", "data", "train", "report")
            if isinstance(began.get(key), Mapping) and isinstance(self.tree[key], Mapping)
        ]
        if unknown := [f"{at}{key}" for at, old, new in sections for key in old if key not in new]:
            raise OutputError(
                f"{self.out} was begun by an earlier version of graftlm, whose recipes had {', '.join(unknown)}: "
                "finish it with that version, or say --overwrite without --resume to start anew",
                code="earlier-version",
            )

    def lock(self, say: Callable[[str], None]) -> AbstractContextManager[None]:
        """Inside, no other process writes to OUT; OutputError where one does. The first rank has it for all."""
        return only_writer(self.out, say=say) if distributed.first() else nullcontext()

    def _holds_an_adapter(self) -> bool:
        return self.out.is_dir() and any(path.name not in KEPT for path in self.out.iterdir())

    def last(self, report: Callable[[str], None]) -> Snapshot | None:
        """The last checkpoint, on every rank the same; None if there is none."""
        if distributed.first():
            self.checkpoints.wait()
        found = self.checkpoints.newest(report) if distributed.first() else None
        (name, *_) = distributed.gathered([found[1].name if found else ""])
        return (found[0] if found else read(self.folder / name)) if name else None

    def newest(self, facts: Mapping[str, Any], *, report: Callable[[str], None]) -> Snapshot | None:
        """The checkpoint to go on from; None to start. TrainingError if it is of other `facts`."""
        snapshot = self.last(report) if self.resumes else None
        if snapshot is None:
            return None
        if not self.changed and "sources" not in snapshot.facts:
            raise TrainingError(
                f"{self.folder}: the checkpoints are of an earlier version of graftlm. Finish the run with it, "
                "or say --overwrite without --resume to start anew",
                code="earlier-version",
            )
        if not self.changed and (found := dependencies.changes(snapshot.facts, facts, self.data)):
            raise TrainingError(
                f"{self.folder}, step {snapshot.facts['seen']}: what the run depends on is not what it was, though the "
                f"recipe is the same:\n{numbered(found)}\n"
                "Put it back, or say --overwrite without --resume to start anew",
                code="dependencies-changed",
            )
        return snapshot

    @contextmanager
    def begin(self, found: Snapshot | None) -> Iterator[RunHandle]:
        """Inside, the run goes on; of one that fails before its first checkpoint nothing is left."""
        if not distributed.first():
            with Metrics(self.folder / METRICS, _metrics_at(found), writes=False) as metrics:
                yield RunHandle(metrics, None)
            return
        with writing(self.out):
            if found is None:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
            with whole(self.folder / UNFINISHED) as draft:
                draft.write_text(json.dumps(self.tree, indent=1) + "\n", encoding="utf-8")
                sync(draft)
            for leftover in self.folder.glob(".*.*"):  # of a save that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            metrics = Metrics(self.folder / METRICS, _metrics_at(found))
        try:
            with metrics, writing(self.out):
                yield RunHandle(metrics, self.checkpoints)
                self.checkpoints.wait()
        finally:
            self.checkpoints.settle()
            if not self.checkpoints.steps():
                shutil.rmtree(self.folder)
                if not any(self.out.iterdir()):
                    self.out.rmdir()

    def best(self) -> Snapshot | None:
        """The checkpoint with the lowest held-out loss, if there is one; TrainingError if it is damaged."""
        try:
            return read(self.folder / BEST) if (self.folder / BEST).is_dir() else None
        except DamagedCheckpointError as error:
            raise TrainingError(
                f"{error}: the state with the lowest held-out loss is lost", code="no-usable-checkpoint"
            ) from None

    def close(self) -> None:
        """The run is done, and all of it is in OUT."""
        if distributed.first():
            os.unlink(self.folder / UNFINISHED)
            sync(self.folder)


def _metrics_at(found: Snapshot | None) -> Mapping[str, Any] | None:
    return found.facts["metrics"] if found else None


def matters(change: str) -> bool:
    """Whether a line of `differences` between recipes is of what is learnt."""
    return not change.startswith(FREE)
