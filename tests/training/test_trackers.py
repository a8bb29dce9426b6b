"""Trackers: they are told every line once, whatever happens to them or to the run, and no network unless asked."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

import graftlm
from graftlm.config.schema import build, to_tree
from graftlm.errors import RecipeError, TrainingError
from graftlm.recipe import Recipe, ReportConfig
from graftlm.training.trackers import TRACKERS, Trackers
from tests.errors import raises

pytestmark = pytest.mark.usefixtures("without_pictures")

STEPS = [{"step": n, "loss": 1 / n, "tokens": 10 * n} for n in range(1, 9)]
ALL = list(TRACKERS)
LAST = 10**9
"""Stands for the step of what is told without one."""


def recipe(*trackers: str, **rest: Any) -> Recipe:
    return build(Recipe, {"data": {"train": "x"}, "report": {"trackers": list(trackers)}, **rest}, source="test")


class TrackerLog:
    """What the libraries were told: (library, run, step) -> numbers; texts; and the arguments that runs began with."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str, int], dict[str, float]] = {}
        self.texts: list[tuple[str, int, str]] = []
        self.began: list[tuple[str, dict[str, Any]]] = []
        self.ended: list[tuple[str, Any]] = []
        self.breaks: dict[tuple[str, int], BaseException] = {}

    def tell(self, library: str, run: str, step: int, numbers: dict[str, Any]) -> None:
        if (library, step) in self.breaks:
            raise self.breaks.pop((library, step))
        for name, value in numbers.items():
            if isinstance(value, str):
                self.texts.append((library, step, value))
            else:
                known = self.numbers.setdefault((library, run, step), {})
                assert name not in known, f"{library} was told {name} of step {step} twice"
                known[name] = value

    def steps(self, library: str) -> list[int]:
        return [step for name, _, step in self.numbers if name == library and step < LAST]


class FakeRun:
    def __init__(self, tracker_log: TrackerLog, library: str, name: str) -> None:
        self.tracker_log, self.library, self.name = tracker_log, library, name
        self.summary: dict[str, float] = {}

    def log(self, numbers: dict[str, Any], step: int = LAST) -> None:
        self.tracker_log.tell(self.library, self.name, step, numbers)

    def finish(self, exit_code: int = 0) -> None:
        self.tracker_log.ended.append((self.library, self.summary))


@pytest.fixture
def tracker_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackerLog]:
    """The four libraries, as far as they are used; and an environment that no test leaves changed."""
    tracker_log = TrackerLog()

    def begin(library: str) -> Any:
        def init(**kwargs: Any) -> FakeRun:
            tracker_log.began.append((library, kwargs))
            if (library, 0) in tracker_log.breaks:
                raise tracker_log.breaks[library, 0]
            return FakeRun(tracker_log, library, kwargs.get("id") or kwargs["name"])

        return init

    class Client:
        def get_experiment_by_name(self, name: str) -> Any:
            return None

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment: str, run_name: str) -> Any:
            tracker_log.began.append(("mlflow", {"name": run_name, "id": None, "experiment": experiment}))
            return SimpleNamespace(info=SimpleNamespace(run_id="run-1"))

        def update_run(self, run: str, status: str) -> None:
            tracker_log.began.append(("mlflow", {"id": run}))

        def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(params) <= 100
            for name, value, _, step in metrics:
                tracker_log.tell("mlflow", run, step, {name: value})

        def log_metric(self, run: str, name: str, value: float, step: int) -> None:
            tracker_log.ended.append(("mlflow", {name: value}))

        def set_tag(self, run: str, key: str, value: str) -> None:
            tracker_log.texts.append(("mlflow", int(key.split()[-1]), value))

        def set_terminated(self, run: str, status: str) -> None:
            tracker_log.ended.append(("mlflow", status))

    class Writer:
        def __init__(self, log_dir: str) -> None:
            tracker_log.began.append(("tensorboard", {"id": "tensorboard", "dir": log_dir}))
            self.closing = False

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if "/" in name and "held" in name:
                tracker_log.ended.append(("tensorboard", {name: value}))
            else:
                tracker_log.tell("tensorboard", "tensorboard", step, {name: value})

        def add_text(self, name: str, value: str, step: int = 0) -> None:
            if name == "events":
                tracker_log.texts.append(("tensorboard", step, value))

        def flush(self) -> None: ...

        def close(self) -> None: ...

    made = {
        "wandb": {"init": begin("wandb")},
        "trackio": {"init": begin("trackio")},
        "mlflow": {"MlflowClient": Client},
        "mlflow.entities": {"Metric": lambda *fields: fields, "Param": lambda *fields: fields},
        "tensorboard": {},
        "torch.utils.tensorboard": {"SummaryWriter": Writer},
    }
    for name, members in made.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for member, value in members.items():
            setattr(module, member, value)
        monkeypatch.setitem(sys.modules, name, module)
    before = dict(os.environ)
    for variable in ("MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_MODE"):
        os.environ.pop(variable, None)
    yield tracker_log
    os.environ.clear()
    os.environ.update(before)


def begun(recipe: Recipe, out: Path, lines: list[dict[str, Any]] | None = None) -> Trackers:
    """Those of a fresh run, or of one that resumes after `lines`."""
    trackers = Trackers(to_tree(recipe), out)
    trackers.begin(lines or [], resumes=lines is not None)
    return trackers


@pytest.mark.parametrize("name", ALL)
def test_every_line_is_told_once_and_as_it_stands(name: str, tracker_log: TrackerLog, tmp_path: Path) -> None:
    trackers = begun(recipe(name), tmp_path)
    event = {"event": "rank", "step": 2, "left": 3, "site": "q_proj"}
    for line in (*STEPS[:2], event, {"step": 3, "loss": math.nan, "tokens": 5}):
        assert trackers.log(line) == []
    assert trackers.finish({"held_out": {"loss_nats": {"base": None, "tuned": 1.5}}, "on": True}) == []
    run = next(key[1] for key in tracker_log.numbers)
    assert tracker_log.numbers[name, run, 1] == {"loss": 1.0, "tokens": 10}
    assert tracker_log.numbers[name, run, 2] == {"loss": 0.5, "tokens": 20, "rank/left": 3}
    assert tracker_log.numbers[name, run, 3] == {"tokens": 5}, "what is not finite cannot be drawn"
    assert [(step, json.loads(text)) for _, step, text in tracker_log.texts] == [(2, event)]
    last = [tracker_log.numbers.get((name, run, LAST)), *(end for _, end in tracker_log.ended)]
    assert {"held_out/loss_nats/tuned": 1.5} in last


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_goes_on_where_it_was_and_tells_no_step_twice(
    name: str, tracker_log: TrackerLog, tmp_path: Path
) -> None:
    first = begun(recipe(name), tmp_path)
    for line in STEPS[:5]:
        first.log(line)  # and then the process is killed; its checkpoint is of step 3
    again = begun(recipe(name), tmp_path, STEPS[:3])
    for line in STEPS[3:]:
        again.log(line)
    assert tracker_log.steps(name) == list(range(1, 9))
    assert len({run for _, run, _ in tracker_log.numbers}) == 1, "it is the same run for the tracker"
    if name in ("wandb", "trackio"):
        assert [given["resume"] for _, given in tracker_log.began] == ["allow", "allow"]


def test_a_process_that_is_killed_while_telling_does_not_tell_it_again(tracker_log: TrackerLog, tmp_path: Path) -> None:
    tracker_log.breaks["wandb", 3] = KeyboardInterrupt()
    first = begun(recipe("wandb"), tmp_path)
    first.log(STEPS[0])
    first.log(STEPS[1])
    with pytest.raises(KeyboardInterrupt):
        first.log(STEPS[2])
    again = begun(recipe("wandb"), tmp_path, STEPS[:1])
    for line in STEPS[1:]:
        again.log(line)
    assert tracker_log.steps("wandb") == [1, 2, 4, 5, 6, 7, 8], "at most once, and what is sure is metrics.jsonl"


def test_one_that_fails_is_told_as_an_event_and_stops_nothing(tracker_log: TrackerLog, tmp_path: Path) -> None:
    tracker_log.breaks["wandb", 3] = OSError("no route to host\nmore")
    trackers = begun(recipe("wandb", "trackio"), tmp_path)
    events = [event for line in STEPS for event in trackers.log(line)]
    assert len(events) == 1
    assert (events[0]["event"], events[0]["tracker"], events[0]["step"]) == ("tracker failed", "wandb", 3)
    assert "OSError: no route to host." in events[0]["why"]
    json.dumps(events)
    assert tracker_log.steps("wandb") == [1, 2], "it is not tried again at every step"
    assert tracker_log.steps("trackio") == list(range(1, 9))
    begun(recipe("wandb", "trackio"), tmp_path, STEPS)
    assert tracker_log.steps("wandb") == [1, 2, 4, 5, 6, 7, 8], "a run that resumes catches up"
    assert tracker_log.steps("trackio") == list(range(1, 9))


def test_one_that_is_asked_for_later_is_told_all_from_the_start(tracker_log: TrackerLog, tmp_path: Path) -> None:
    begun(recipe(), tmp_path)
    assert not list(tmp_path.iterdir()), "no tracker, no file"
    begun(recipe("mlflow"), tmp_path, STEPS[:4])
    assert tracker_log.steps("mlflow") == [1, 2, 3, 4]


def test_what_cannot_begin_is_said_at_the_start(
    tracker_log: TrackerLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker_log.breaks["wandb", 0] = ValueError("no key: log in first")
    with pytest.raises(TrainingError, match=r"wandb cannot begin: ValueError: no key: log in first"):
        begun(recipe("wandb"), tmp_path)
    for name in ("wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("graftlm.training.trackers.find_spec", lambda name: sys.modules.get(name))
    with pytest.raises(TrainingError, match=r"not installed here: pip install wandb; pip install mlflow"):
        begun(recipe("wandb", "mlflow", "trackio"), tmp_path)
    with pytest.raises(RecipeError, match="tensorboard"):
        recipe("tensorbord")


def test_a_damaged_record_is_said_and_not_guessed(tracker_log: TrackerLog, tmp_path: Path) -> None:
    begun(recipe("wandb"), tmp_path).log(STEPS[0])
    (tmp_path / "trackers" / "told.json").write_text('{"wandb": {"ru')
    with pytest.raises(TrainingError, match="told.json is damaged.*delete"):
        begun(recipe("wandb"), tmp_path, STEPS)


def test_nothing_leaves_the_machine_unless_the_recipe_says_so(tracker_log: TrackerLog, tmp_path: Path) -> None:
    begun(recipe("wandb", "mlflow"), tmp_path)
    assert tracker_log.began[0][1]["mode"] == "offline"
    assert tracker_log.began[0][1]["dir"] == str(tmp_path / "trackers")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    for name, variable, value in (
        ("mlflow", "MLFLOW_TRACKING_URI", "https://example.org"),
        ("mlflow", "MLFLOW_TRACKING_URI", "databricks://profile"),
        ("trackio", "TRACKIO_SPACE_ID", "me/space"),
    ):
        os.environ[variable] = value
        with pytest.raises(TrainingError, match=f"{variable} is {value}: set `network: true`"):
            begun(recipe(name), tmp_path / name)
        (tmp_path / "net").mkdir(exist_ok=True)
        begun(recipe(name, network=True), tmp_path / "net")
        del os.environ[variable]
    os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///runs.db"
    begun(recipe("mlflow"), tmp_path)
    tracker_log.began.clear()
    begun(recipe("wandb", network=True), tmp_path)
    assert tracker_log.began[0][1]["mode"] is None, "as wandb itself is set up"


@pytest.mark.parametrize("fails", [False, True])
def test_the_environment_is_as_it_was_after_a_run(tracker_log: TrackerLog, tmp_path: Path, fails: bool) -> None:
    """What trackers set for their libraries holds while they are in use."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "99"
    before = dict(os.environ)
    with suppress(ValueError), Trackers(to_tree(recipe("wandb", "mlflow")), tmp_path) as trackers:
        trackers.begin()
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        assert os.environ["WANDB_ERROR_REPORTING"] == "false"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "99", "the user's own"
        if fails:
            raise ValueError
    assert dict(os.environ) == before


def test_the_recipe_names_those_of_the_table() -> None:
    assert set(get_args(get_args(get_type_hints(ReportConfig)["trackers"])[0])) == set(TRACKERS)


def test_tensorboard_can_read_what_it_was_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = begun(recipe("tensorboard"), tmp_path)
    for line in STEPS[:5]:
        first.log(line)  # not finished: its process is killed
    again = begun(recipe("tensorboard"), tmp_path, STEPS[:3])
    for line in STEPS[3:]:
        again.log(line)
    again.finish({"loss_nats": 0.5})
    read = EventAccumulator(str(tmp_path / "trackers" / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == list(range(1, 9))
    assert read.Scalars("loss")[3].value == pytest.approx(0.25)
    assert read.Scalars("loss_nats")[0].value == 0.5


# In a run --------------------------------------------------------------------------------------------------------


def whole(base: Path, rows: Path, *trackers: str, **train: Any) -> Recipe:
    tree = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "held_out": 4},
        "delta": {"method": "lora", "r": 2},
        "train": {"steps": 6, "batch_rows": 2, "save_every": 2, **train},
        "report": {"answers": 0, "trackers": list(trackers)},
    }
    return build(Recipe, tree, source="test")


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_run_that_is_killed_and_resumed_is_one_run_for_its_tracker(
    name: str, tracker_log: TrackerLog, base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftlm.training.run_folder import RunHandle

    tree, real = whole(base_folder, rows, name), RunHandle.log

    def note(run: RunHandle, line: dict[str, Any]) -> None:
        real(run, line)
        if line["step"] == 5:
            raise KeyboardInterrupt  # at once: its last checkpoint is of step 4

    with monkeypatch.context() as patch:
        patch.setattr(RunHandle, "log", note)
        with pytest.raises(KeyboardInterrupt):
            graftlm.train(tree, tmp_path / "out")
    summary = graftlm.train(tree, tmp_path / "out", resume=True).summary
    assert tracker_log.steps(name) == [1, 2, 3, 4, 5, 6]
    lines = {line["step"]: line for line in metrics(tmp_path / "out")}
    for (_, _, step), numbers in tracker_log.numbers.items():
        if step in lines:
            assert numbers["loss"] == lines[step]["loss"], "also of a step that was made twice: both are the same"
    ends = [tracker_log.numbers.get((name, key[1], LAST)) for key in tracker_log.numbers] + [
        end for _, end in tracker_log.ended
    ]
    assert any(end and end.get("held_out/loss_nats/tuned") == summary["held_out"]["loss_nats"]["tuned"]
               for end in ends if isinstance(end, dict))  # fmt: skip
    assert (tmp_path / "out" / "trackers" / "told.json").is_file(), "it stays when the adapter is written"
    tracker_log.numbers.clear()
    graftlm.train(tree, tmp_path / "out", overwrite=True)
    assert tracker_log.steps(name) == [1, 2, 3, 4, 5, 6], "a fresh run is told anew"


def test_a_tracker_that_fails_changes_nothing_but_an_event(
    tracker_log: TrackerLog, base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    tracker_log.breaks["wandb", 3] = OSError("no route to host")
    graftlm.train(whole(base_folder, rows, "wandb"), tmp_path / "out")
    graftlm.train(whole(base_folder, rows), tmp_path / "without")
    lines, plain = metrics(tmp_path / "out"), metrics(tmp_path / "without")
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in plain]
    (event,) = (line for line in lines if "event" in line)
    assert (event["event"], event["step"], event["tracker"]) == ("tracker failed", 3, "wandb")
    ours, theirs = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "without"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not (tmp_path / "without" / "trackers").exists()


def test_what_is_missing_is_said_before_anything_is_read_and_a_failed_start_leaves_nothing(
    tracker_log: TrackerLog, base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("graftlm.training.trackers.find_spec", lambda name: None)
        with raises("training/missing-package", match="pip install trackio"):
            graftlm.train(whole(base_folder, tmp_path / "no-such-rows.jsonl", "trackio"), tmp_path / "out")
    tracker_log.breaks["trackio", 0] = ValueError("no")
    with raises("training/tracker-failed", match="trackio"):
        graftlm.train(whole(base_folder, rows, "trackio"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
