"""TRACKERS: other places to watch a run in. Each is told the lines of metrics.jsonl, and nothing else.

metrics.jsonl is the one account of a run; a tracker is a copy of it that may lag or break. So `told.json` says,
for each tracker, under which name it knows the run and up to which step it was told. That is written before
the lines of a step are sent: a process that is killed in between costs the tracker that step, and none is sent twice. A
run that resumes tells first what metrics.jsonl holds and the tracker was not told, then the steps that come.

At the start, whatever is wrong with a tracker stops the run: nothing is lost yet, and a picture was asked for. Later
nothing that a tracker does stops it: hours of training are worth more than their picture, which can be drawn again. It
is then left alone until the run resumes, since one that waits for a network would wait at every step.

Nothing leaves this machine unless the recipe says `network: true`.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit
from uuid import uuid4

import yaml

from graftlm import distributed
from graftlm.config.trees import Tree
from graftlm.errors import TrainingError
from graftlm.files import writing

PROJECT = "graftlm"
FOLDER, RECORD = "trackers", "told.json"


class Tracker:
    """Another place to watch a run in. Raises what its library raises; `Trackers` deals with that."""

    module: ClassVar[str]
    install: ClassVar[str]

    def start(self, recipe: Tree, folder: Path, run: str | None) -> str:
        """Begin a run, or go on with the one that was called `run` here; returns what it is called.

        Its files may lie in `folder`, which is OUT/trackers.
        """
        raise NotImplementedError

    def log(self, step: int, numbers: Mapping[str, float], event_text: str) -> None:
        """The finite numbers of a line, and an event as text, if it is one."""
        raise NotImplementedError

    def finish(self, numbers: Mapping[str, float] | None) -> None:
        """The numbers of summary.json, or None for a run that has not come to its end."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """Event files in OUT/trackers/tensorboard: `tensorboard --logdir` any folder above."""

    module, install = "tensorboard", "pip install tensorboard"

    def start(self, recipe: Tree, folder: Path, run: str | None) -> str:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(log_dir=str(folder / "tensorboard"))
        self.last = 0
        if run is None:
            self.writer.add_text("recipe", f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```")
        return "tensorboard"

    def log(self, step: int, numbers: Mapping[str, float], event_text: str) -> None:
        self.last = step
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        if event_text:
            self.writer.add_text("events", event_text, step)
        self.writer.flush()  # else it keeps two minutes of them, which a process that is killed would lose

    def finish(self, numbers: Mapping[str, float] | None) -> None:
        for name, value in (numbers or {}).items():
            self.writer.add_scalar(name, value, self.last)
        self.writer.close()


class Wandb(Tracker):
    """Offline in OUT/trackers/wandb, for `wandb sync`; with `network: true` as wandb itself is set up."""

    module, install = "wandb", "pip install wandb"

    def start(self, recipe: Tree, folder: Path, run: str | None) -> str:
        if not recipe["network"]:
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        run = run or _fresh()
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.parent.name,
            id=run,
            resume="allow",
            dir=str(folder),
            config=recipe,
            mode=None if recipe["network"] else "offline",
        )
        return run

    def log(self, step: int, numbers: Mapping[str, float], event_text: str) -> None:
        self.run.log({**numbers, **({"event": event_text} if event_text else {})}, step=step)

    def finish(self, numbers: Mapping[str, float] | None) -> None:
        self.run.summary.update(dict(numbers or {}))
        self.run.finish(exit_code=0 if numbers else 1)


class MLflow(Tracker):
    """Where MLflow keeps its runs: MLFLOW_TRACKING_URI or its own default, a file in the folder that graft runs in."""

    module, install = "mlflow", "pip install mlflow"

    def start(self, recipe: Tree, folder: Path, run: str | None) -> str:
        _only_local(recipe, "MLFLOW_TRACKING_URI")
        if not recipe["network"]:
            os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        # Of its own accord MLflow tries for many minutes, in which training would stand still.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client: Any = MlflowClient()
        self.last = 0
        if run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self.client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self.client.create_experiment(name)
            run = str(self.client.create_run(experiment, run_name=folder.parent.name).info.run_id)
            params = [Param(key, str(value)) for key, value in _leaves(recipe, ".")]
            for first in range(0, len(params), 100):  # as many as it takes at once
                self.client.log_batch(run, params=params[first : first + 100])
        else:
            self.client.update_run(run, status="RUNNING")
        self.run = run
        return run

    def log(self, step: int, numbers: Mapping[str, float], event_text: str) -> None:
        from mlflow.entities import Metric

        self.last = step
        now = int(1000 * time.time())
        self.client.log_batch(self.run, [Metric(name, value, now, step) for name, value in numbers.items()])
        if event_text:
            self.client.set_tag(self.run, f"event at step {step}", event_text[:5000])

    def finish(self, numbers: Mapping[str, float] | None) -> None:
        for name, value in (numbers or {}).items():
            self.client.log_metric(self.run, name, value, step=self.last)
        self.client.set_terminated(self.run, "FINISHED" if numbers else "KILLED")


class Trackio(Tracker):
    """Where trackio keeps its runs on this machine: TRACKIO_DIR, or a folder in the cache of the hub's library."""

    module, install = "trackio", "pip install trackio"

    def start(self, recipe: Tree, folder: Path, run: str | None) -> str:
        _only_local(recipe, "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL")
        import trackio

        name = run or f"{folder.parent.name}-{_fresh()}"
        self.run: Any = trackio.init(
            project=PROJECT,
            name=name,
            resume="allow",  # not "must": it writes runs late, and one that was killed early may not be there
            config=recipe,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return name

    def log(self, step: int, numbers: Mapping[str, float], event_text: str) -> None:
        self.run.log({**numbers, **({"event": event_text} if event_text else {})}, step=step)

    def finish(self, numbers: Mapping[str, float] | None) -> None:
        if numbers:
            self.run.log(dict(numbers))
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_installed(names: Sequence[str]) -> None:
    """Raise TrainingError for trackers whose library is not there, with the way to get it."""
    missing = [TRACKERS[name].install for name in names if find_spec(TRACKERS[name].module) is None]
    if missing:
        raise TrainingError(
            f"report.trackers: not installed here: {'; '.join(missing)}. Or leave them out", code="missing-package"
        )


class Trackers:
    """The trackers of one run, in OUT/trackers: `begin`, `log` each line that stands in metrics.jsonl, `finish`.

    The last two return what went wrong, as events for metrics.jsonl. On ranks other than the first nothing is told.
    Made before anything is loaded: raises TrainingError for a library that is not there. A context that finishes what
    was not, and takes away what is left in OUT of a run that failed and left nothing else.
    """

    def __init__(self, recipe: Tree, out: Path) -> None:
        """`recipe` is the tree that the trackers show; it names them in `report.trackers`."""
        self.names: Sequence[str] = recipe["report"]["trackers"]
        check_installed(self.names)
        self.recipe, self.folder = recipe, out / FOLDER
        self._records: dict[str, dict[str, Any]] = {}
        self._before: dict[str, int] = {}
        self._running: dict[str, Tracker] = {}
        self._step = 0

    def begin(self, lines: Sequence[Mapping[str, Any]] = (), *, resumes: bool = False) -> None:
        """Begin runs, or where this one `resumes` go on with them and tell what of its `lines` they do not know.

        Raises TrainingError where a tracker cannot begin.
        """
        if not distributed.first():
            return
        if not resumes:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not self.names:
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if (record := self.folder / RECORD).is_file():
            try:
                self._records = json.loads(record.read_text(encoding="utf-8"))
            except ValueError:
                raise TrainingError(
                    f"{record} is damaged, so what trackers were told is not known: delete {self.folder} to begin anew",
                    code="damaged-tracker-record",
                ) from None
        for name in self.names:
            tracker, tracker_record = TRACKERS[name](), self._records.setdefault(name, {"run": None, "step": 0})
            try:
                tracker_record["run"] = tracker.start(self.recipe, self.folder, tracker_record["run"])
            except TrainingError:
                raise
            except Exception as error:
                raise TrainingError(
                    f"report.trackers: {name} cannot begin: {_why(error)}", code="tracker-failed"
                ) from error
            self._running[name] = tracker
            self._before[name] = tracker_record["step"]
        self._write()
        for line in lines:
            for event in self.log(line):
                raise TrainingError(
                    f"report.trackers: {event['tracker']} cannot go on: {event['why']}", code="tracker-failed"
                )

    def __enter__(self) -> "Trackers":
        self._environment = {name: os.environ.get(name) for name in SET_FOR_TRACKERS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:  # who asks a second time does not want to wait for them
            self.finish(None)
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        out = self.folder.parent
        failed = kind is not None and distributed.first() and self.folder.is_dir()
        if failed and [path.name for path in out.iterdir()] == [FOLDER]:
            shutil.rmtree(out)

    def log(self, line: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A line as it stands in metrics.jsonl. What was told of its step by an earlier process is not told again.

        A line that names no step belongs to that of the line before it.
        """
        step = int(line.get("step", self._step))
        to_tell = [name for name in self._running if step > self._before[name]]
        if to_tell and step > self._step:
            for name in to_tell:
                self._records[name]["step"] = step
            self._write()
        self._step = max(step, self._step)
        event = line.get("event")
        prefix = f"{event}/" if event else ""
        numbers = {prefix + name: value for name, value in _numbers(line) if name != "step"}
        event_text = json.dumps(dict(line)) if event else ""
        return self._each(to_tell, lambda tracker: tracker.log(step, numbers, event_text))

    def finish(self, summary: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """`summary` is that of summary.json, or None for a run that has not come to its end."""
        numbers = None if summary is None else dict(_numbers(summary))
        failures = self._each(list(self._running), lambda tracker: tracker.finish(numbers))
        self._running = {}
        return failures

    def _each(self, names: Sequence[str], tell: Callable[[Tracker], None]) -> list[dict[str, Any]]:
        failures = []
        for name in names:
            try:
                tell(self._running[name])
            except Exception as error:
                del self._running[name]
                why = f"{_why(error)}. Training goes on, and it is told nothing more until the run resumes"
                failures.append({"event": "tracker failed", "step": self._step, "tracker": name, "why": why})
        return failures

    def _write(self) -> None:
        """In place and in one call, so that a process that is killed leaves the old text or the new one."""
        text = json.dumps(self._records).encode()
        with writing(self.folder):
            handle = os.open(self.folder / RECORD, os.O_WRONLY | os.O_CREAT)
            try:
                os.pwrite(handle, text.ljust(os.fstat(handle).st_size), 0)
            finally:
                os.close(handle)


def _fresh() -> str:
    return uuid4().hex[:8]


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def _only_local(recipe: Tree, *variables: str) -> None:
    """Raise TrainingError where the environment sends a tracker over the network and the recipe does not allow it."""
    for variable in variables:
        value = os.environ.get(variable, "")
        if value and not recipe["network"] and not (variable.endswith("_URI") and urlsplit(value).scheme in LOCAL):
            raise TrainingError(
                f"{variable} is {value}: set `network: true` in the recipe to allow it, or unset it",
                code="network-not-allowed",
            )


LOCAL = ("", "file", "sqlite")

SET_FOR_TRACKERS = (
    "WANDB_ERROR_REPORTING",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
)
"""Environment variables that trackers set while they are in use; a run puts them back."""


def _leaves(tree: object, between: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield prefix.removesuffix(between), tree
        return
    for key, value in tree.items():
        yield from _leaves(value, between, f"{prefix}{key}{between}")


def _numbers(tree: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What can be drawn: finite numbers, by their path."""
    for name, value in _leaves(tree, "/"):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, value
