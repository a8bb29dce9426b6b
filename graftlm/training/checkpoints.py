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
before it is taken. Randomness needs no place here: it depends on the seed, the step and the rank alone (`loop.steps`).
Rank 0 writes all, for deltas and optimizer are whole on every rank, so any number of ranks can go on.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.adapters.folder import sha256_of
from graftlm.adapters.tensors import fill_delta, tensors_of_delta
from graftlm.errors import TrainingError, numbered
from graftlm.files import sync, writing
from graftlm.training.callback import Callback
from graftlm.training.objective import extra_parameters
from graftlm.training.state import TrainingState

FOLDER, UNFINISHED, METRICS = "checkpoints", "unfinished.json", "metrics.jsonl"
STATE, FACTS, MANIFEST = "state.safetensors", "state.json", "manifest.json"

BEST = "best"
"""The checkpoint with the lowest held-out loss, under early stopping; not one of the last that are kept."""

FROM_RECIPE = {"lr", "largest_lr", "weight_decay"}
"""What of an optimizer's groups follows from the recipe, so that a recipe that was changed on purpose counts."""


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps: tensors on the CPU that nobody changes any more, and facts that JSON can say."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


# State <-> snapshot ----------------------------------------------------------------------------------------------


def take(training: TrainingState, callbacks: Sequence[Callback], every: Sequence[str], **facts: Any) -> Snapshot:
    """Copy all that a step changes: `every` delta of the model, and the optimizer and callbacks of those that learn."""
    tensors: dict[str, Tensor] = {}
    for name in every:
        tensors |= {f"delta/{name}/{key}": t for key, t in tensors_of_delta(training.model, name).items()}
    learns_too = extra_parameters(training.model)
    tensors |= {f"beside/{name}": parameter for name, parameter in learns_too.items()}
    kept: dict[str, dict[str, Any]] = {}
    for name, parameter in (training.parameters() | learns_too).items():
        for key, value in training.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            else:
                kept.setdefault(name, {})[key] = value
    for callback in callbacks:
        tensors |= {f"callback/{callback.config.name}/{key}": tensor for key, tensor in callback.tensors.items()}
    groups = [
        {k: v for k, v in group.items() if isinstance(v, int | float) and k not in FROM_RECIPE}
        for group in training.optimizer.param_groups
    ]
    known = {
        "done": training.done,
        "optimizer": {"class": type(training.optimizer).__name__, "groups": groups, "kept": kept},
        "callbacks": {callback.config.name: json.loads(json.dumps(callback.facts)) for callback in callbacks},
    }
    copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    return Snapshot(copies, known | facts)


def put_back(snapshot: Snapshot, training: TrainingState, callbacks: Sequence[Callback]) -> None:
    """What `take` copied, into an optimizer and callbacks that are made for the same parameters."""
    kept = snapshot.facts["optimizer"]
    if kept["class"] != type(training.optimizer).__name__:
        raise TrainingError(
            f"the checkpoint is of optimizer {kept['class']}, the recipe makes {type(training.optimizer).__name__}",
            code="checkpoint-mismatch",
        )
    training.done = snapshot.facts["done"]
    learns_too = extra_parameters(training.model)
    for name, tensor in _under("beside", snapshot).items():
        learns_too[name].data.copy_(tensor)
    parameters = training.parameters() | learns_too
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in kept["kept"].items()}
    for name, tensor in _under("optimizer", snapshot).items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(parameter, {})[key] = tensor
    if strange := sorted(state.keys() - parameters.keys()):
        raise TrainingError(
            f"the checkpoint's optimizer knows tensors that are not here:\n{numbered(strange)}",
            code="checkpoint-mismatch",
        )
    tree = training.optimizer.state_dict()
    number = {id(p): i for i, p in enumerate(p for group in training.optimizer.param_groups for p in group["params"])}
    tree["state"] = {number[id(parameters[name])]: values for name, values in state.items()}
    for group, saved in zip(tree["param_groups"], kept["groups"], strict=True):
        group |= saved
    training.optimizer.load_state_dict(tree)  # it knows which of these belong on which device
    for callback in callbacks:
        name = callback.config.name
        callback.facts = dict(snapshot.facts["callbacks"].get(name, {}))
        callback.tensors = {key: t.to(training.model.device) for key, t in _under(f"callback/{name}", snapshot).items()}  # type: ignore[arg-type]


def put_deltas_back(snapshot: Snapshot, model: Any, every: Sequence[str], source: Path) -> None:
    """The deltas of the snapshot into deltas that are attached; AdapterError where they are others."""
    for name in every:
        fill_delta(model, name, _under(f"delta/{name}", snapshot), source / STATE)


def _under(beginning: str, snapshot: Snapshot) -> dict[str, Tensor]:
    beginning += "/"
    return {key[len(beginning) :]: tensor for key, tensor in snapshot.tensors.items() if key.startswith(beginning)}


# Snapshot <-> disk -----------------------------------------------------------------------------------------------


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
        wanted = json.loads(sums)
        for name in (STATE, FACTS):
            if _about(path / name) != wanted[name]:
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
        known = b""
        if where:
            with open(file, "rb") as before:
                known = before.read(where["bytes"])
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in known.splitlines()]
        self._sum = hashlib.sha256(known)
        self._file = open(file if writes else os.devnull, "rb+" if where else "wb")  # noqa: SIM115
        if where and writes:
            self._file.truncate(len(known))
            self._file.seek(len(known))

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
    gone = path
    if not path.name.startswith("."):
        gone = path.with_name(f".{path.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
    shutil.rmtree(gone)


def _about(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
