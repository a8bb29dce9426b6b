"""Sweeps: every point of the grid once, whatever fails or is stopped on the way; on Ray the same runs."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import graftlm
from graftlm import cli
from graftlm.config.schema import to_tree, to_yaml
from graftlm.recipe import read_recipe
from graftlm.run import RESUMABLE
from graftlm.runs import sweep as sweeping
from graftlm.runs.compare import compare
from graftlm.runs.sweep import Outcome, grid, resolve, sweep, values_of
from tests.errors import raises

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def recipe(base_folder: Path, rows: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"base: {{name: {base_folder}, dtype: float32}}\n"
        f"data: {{train: {rows}, held_out: 2}}\n"
        "delta: {method: lora, r: 2}\n"
        "train: {steps: 2, batch_rows: 2}\n"
        "report: {answers: 0}\n"
    )
    return file


# The grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("4,16,64", ["4", "16", "64"]),
        ("0..2", ["0", "1", "2"]),
        ("-1..1", ["-1", "0", "1"]),
        ("0..1,7", ["0", "1", "7"]),
        ("5e-4", ["5e-4"]),
        ("[q_proj, v_proj],all-linear", ["[q_proj, v_proj]", "all-linear"]),
        ("{method: lora, r: 4},{method: dora, r: 8}", ["{method: lora, r: 4}", "{method: dora, r: 8}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("../rows.jsonl,a..b.jsonl", ["../rows.jsonl", "a..b.jsonl"]),
    ],
)
def test_values_are_listed_or_counted_out(text: str, values: list[str]) -> None:
    assert values_of(f"key={text}", text) == values


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("2..0", "recipe/invalid-range"),
        ("0.1..0.5", "recipe/invalid-range"),
        ("1,2,1", "recipe/repeated-value"),
        ("0..2,1", "recipe/repeated-value"),
    ],
)
def test_a_range_that_is_none_is_refused(text: str, code: str) -> None:
    with raises(code):
        values_of(f"key={text}", text)


def test_the_grid_is_every_combination_and_folders_are_named_by_their_values(recipe: Path) -> None:
    points = grid(recipe, ["lora.r=4,16", "seed=0..2", "train.steps=7"])
    assert [point.name for point in points] == [f"r={r},seed={s}" for r in (4, 16) for s in (0, 1, 2)]
    for point in points:
        tree = to_tree(point.recipe)
        assert point.name == f"r={tree['delta']['r']},seed={tree['train']['seed']}"
        assert tree["train"]["steps"] == 7
    assert [point.name for point in grid(recipe, ["seed=3"])] == ["seed=3"]
    assert [point.name for point in grid(recipe, [])] == ["run"]


def test_a_value_that_cannot_stand_in_a_name_gets_one_that_is_its_own(recipe: Path) -> None:
    points = grid(recipe, ["targets=[q_proj],[q_proj ],a/b,../a", "learning_rate=5e-4,1e-3"])
    names = [point.name for point in points]
    assert len(set(names)) == 8
    assert all("/" not in name and name.isascii() for name in names)
    assert names == [
        point.name for point in grid(recipe, ["targets=[q_proj],[q_proj ],a/b,../a", "learning_rate=5e-4,1e-3"])
    ]
    assert "learning_rate=5e-4" in names[0]


@pytest.mark.parametrize(
    ("key", "full"),
    [
        ("lora.r", "delta.r"), ("r", "delta.r"), ("delta.r", "delta.r"), ("seed", "train.seed"), ("delta", "delta"),
        ("method", "delta.method"), ("learning_rate", "train.learning_rate"), ("base.dtype", "base.dtype"),
        ("network", "network"), ("delta.k", "delta.k"),
    ],
)  # fmt: skip
def test_the_end_of_a_key_is_enough(key: str, full: str, recipe: Path) -> None:
    assert resolve(key, to_tree(read_recipe(recipe))) == full


def test_what_a_recipe_is_silent_on_can_be_varied_and_what_it_says_exchanged(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {train: x}\n")
    ranks = [point.recipe.delta.r for point in grid(tmp_path / "r.yaml", ["lora.r=4,8", "seed=0"])]  # type: ignore
    assert ranks == [4, 8]
    (tmp_path / "r.yaml").write_text("data: {train: x}\ndelta: {method: lora, r: 4}\n")
    points = grid(tmp_path / "r.yaml", ["method=lora,dora,mora"])
    assert [point.recipe.delta.method for point in points] == ["lora", "dora", "mora"]  # type: ignore[union-attr]


def test_a_key_that_is_none_or_several_is_refused_with_what_is_near(recipe: Path) -> None:
    with raises("recipe/unknown-key", match="Did you mean 'learning_rate'"):
        grid(recipe, ["learning_rat=1e-3"])
    with raises("recipe/unknown-key", match="dora.r"):
        grid(recipe, ["dora.r=4"])
    two = recipe.with_name("two.yaml")
    two.write_text("data: {train: x}\ndeltas: {a: {method: lora}, b: {method: lora}}\n")
    with raises("recipe/ambiguous-key", match="deltas.a.r or deltas.b.r"):
        grid(two, ["lora.r=4"])
    assert grid(two, ["a.r=4,8"])[1].recipe.deltas["a"].r == 8  # type: ignore[attr-defined]
    with raises("recipe/repeated-key"):
        grid(recipe, ["delta.r=4", "lora.r=8"])
    with raises("recipe/malformed-override"):
        grid(recipe, ["seed"])


def test_every_point_must_be_a_recipe_before_the_first_is_run(recipe: Path) -> None:
    with raises("recipe/unusable-points", match=r"delta.r: .*greater than 0"):
        grid(recipe, ["lora.r=4,0", "seed=0..1"])
    with raises("recipe/unusable-points", match="delta.k: unknown key"):
        grid(recipe, ["delta.k=1,2"])


# The runs --------------------------------------------------------------------------------------------------------


def finished(folder: Path, recipe: Path) -> None:
    """What a run leaves."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "unfinished.json").unlink(missing_ok=True)
    (folder / "recipe.yaml").write_text(recipe.read_text())
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (folder / "summary.json").write_text('{"held_out": {"loss_nats": {"base": 3.0, "tuned": 2.0}}}')


class Trainer:
    """Stands for `graft train`: leaves a finished folder, or ends with the code that is planned for a name."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.codes: dict[str, int] = {}
        self.then: Callable[[], None] = lambda: None

    def __call__(self, recipe: Path, folder: Path, log: Path, **rest: Any) -> int:
        self.ran.append(folder.name)
        self.then()
        code = self.codes.pop(folder.name, 0)
        log.write_text(f"said by {folder.name}\n\n")
        if code == 0:
            finished(folder, recipe)
        elif code == RESUMABLE:
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "checkpoints" / "unfinished.json").write_text(json.dumps(to_tree(read_recipe(recipe))))
        return code


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    trainer = Trainer()
    monkeypatch.setattr(sweeping, "run_one", trainer)
    return trainer


def test_a_failed_run_is_told_and_loses_no_other_and_the_same_again_does_what_is_left(
    recipe: Path, trainer: Trainer, tmp_path: Path
) -> None:
    points, output = grid(recipe, ["r=2,4", "seed=0..1"]), list[str]()
    names = [point.name for point in points]
    trainer.codes = {names[1]: 1, names[2]: RESUMABLE}
    outcome = sweep(points, tmp_path / "out", say=output.append)
    assert trainer.ran == names
    assert outcome == Outcome(done=[names[0], names[3]], stopped=[names[2]], failed={names[1]: f"said by {names[1]}"})
    assert len(output) == 4
    assert f"2/4 {names[1]}: FAILED with code 1" in output
    trainer.ran.clear()
    again = sweep(points, tmp_path / "out", say=output.append)
    assert trainer.ran == [names[1], names[2]]
    assert again == Outcome(skipped=[names[0], names[3]], done=[names[1], names[2]])
    assert [row["run"] for row in compare([tmp_path / "out"]).rows()] == names
    assert sweep(points, tmp_path / "out", say=output.append).skipped == names


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (
            "reading\nerror[data/unusable-rows]: rows.jsonl: 2 rows cannot be used:\n  1: no answer\n  2: no answer\n",
            "error[data/unusable-rows]: rows",
        ),
        ("Traceback\n  File x\nValueError: no\n\nTraceback\nRuntimeError: out of memory\n", "RuntimeError: out of"),
        ("step 4\nKilled\n\n", "Killed"),
        ("", "its process was ended by signal SIGKILL"),
    ],
)
def test_what_failed_is_read_off_the_log(
    log: str, why: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(recipe: Path, folder: Path, file: Path, **rest: Any) -> int:
        file.write_text(log)
        return -9

    monkeypatch.setattr(sweeping, "run_one", fails)
    assert sweep(grid(recipe, ["seed=0"]), tmp_path, say=lambda line: None).failed["seed=0"].startswith(why)


def test_a_folder_with_a_run_of_another_recipe_is_left_alone(recipe: Path, trainer: Trainer, tmp_path: Path) -> None:
    sweep(grid(recipe, ["seed=0..1"]), tmp_path / "out", say=lambda line: None)
    trainer.ran.clear()
    with raises("output/other-recipe", match=r"seed=0 .*\n  train.steps: 2 -> 9"):
        sweep(grid(recipe, ["seed=0..1", "steps=9"]), tmp_path / "out")
    assert trainer.ran == []


def test_a_run_follows_the_recipe_of_when_the_sweep_began(recipe: Path, trainer: Trainer, tmp_path: Path) -> None:
    points = grid(recipe, ["seed=0..1"])
    trainer.then = lambda: recipe.write_text("nonsense")
    sweep(points, tmp_path / "out", say=lambda line: None)
    assert [row["status"] for row in compare([tmp_path / "out"]).rows()] == ["finished"] * 2
    assert read_recipe(tmp_path / "out" / "recipes" / "seed=1.yaml") == points[1].recipe


def test_ctrl_c_stops_the_run_at_hand_and_begins_no_other(recipe: Path, trainer: Trainer, tmp_path: Path) -> None:
    points = grid(recipe, ["seed=0..2"])
    trainer.codes = {"seed=1": RESUMABLE}
    trainer.then = lambda: os.kill(os.getpid(), signal.SIGINT) if trainer.ran[-1] == "seed=1" else None
    outcome = sweep(points, tmp_path / "out", say=lambda line: None)
    assert outcome == Outcome(done=["seed=0"], stopped=["seed=1"])


def test_the_command_prints_the_table_of_runs_and_says_what_failed(
    recipe: Path, trainer: Trainer, tmp_path: Path
) -> None:
    def graft(*words: str) -> Any:
        out = ("--out", str(tmp_path / "out"))
        return CliRunner().invoke(cli.app, ["sweep", str(recipe), "lora.r=4,16", "seed=0..1", *out, *words])

    trainer.codes = {"r=4,seed=1": 1}
    first = graft()
    assert first.exit_code == 1
    assert "r=4,seed=1 FAILED: said by r=4,seed=1" in first.stderr
    assert "r=16,seed=0" in first.stdout
    trainer.codes = {"r=4,seed=1": RESUMABLE}
    assert graft().exit_code == RESUMABLE
    last = graft("--json", "--sort", "r", "--reverse")
    assert last.exit_code == 0
    tree = json.loads(last.stdout)
    assert [(row["r"], row["seed"]) for row in tree["runs"]] == [(16, 0), (16, 1), (4, 0), (4, 1)]
    assert tree["failed"] == {}
    assert [(row["r"], row["seeds"]) for row in tree["over_seeds"]] == [(4, 2), (16, 2)]


# Its process -----------------------------------------------------------------------------------------------------


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """What runs in place of `python -m graftlm train`: a script with its arguments."""
    package = tmp_path / "package" / "graftlm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import os, signal, sys, time\nfrom pathlib import Path\n" + script)
    monkeypatch.setattr(sweeping.graftlm, "__file__", str(package / "__init__.py"))


def test_a_run_is_a_fresh_process_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "print(os.getpid(), *sys.argv[1:]); sys.exit(3)")
    assert sweeping.run_one(tmp_path / "r.yaml", tmp_path / "out", tmp_path / "log", cwd=str(tmp_path)) == 3
    output = (tmp_path / "log").read_text().split()
    assert output[1:] == ["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--resume"]
    assert int(output[0]) != os.getpid()


def test_a_run_that_is_asked_to_stop_may_save_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "def save(*ignored):\n"
        "    time.sleep(0.5); Path(sys.argv[4], 'saved').write_text(''); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "Path(sys.argv[4]).mkdir(); time.sleep(60)\n"
    )
    stand_in(tmp_path, monkeypatch, script)
    out = tmp_path / "out"
    assert sweeping.run_one(tmp_path / "r", out, tmp_path / "log", stop=out.is_dir, cwd=str(tmp_path)) == RESUMABLE
    assert (out / "saved").is_file()


@pytest.mark.slow
def test_a_sweep_of_a_real_run_resumes_what_was_stopped(recipe: Path, tmp_path: Path) -> None:
    points, out = grid(recipe, ["seed=1", "steps=40", "save_every=10", "threads=1"]), tmp_path / "out"
    name = points[0].name
    (out / "recipes").mkdir(parents=True)
    file, log = out / "recipes" / f"{name}.yaml", out / name / "checkpoints" / "metrics.jsonl"
    file.write_text(to_yaml(points[0].recipe))
    code = sweeping.run_one(file, out / name, tmp_path / "log", stop=lambda: log.is_file() and log.stat().st_size > 9)
    assert code == RESUMABLE, (tmp_path / "log").read_text()
    assert compare([out]).rows()[0]["status"] == "unfinished"
    outcome = sweep(points, out, say=lambda line: None)
    assert outcome == Outcome(done=[name])
    rows = compare([out]).rows()
    assert [(row["steps"], row["status"]) for row in rows] == [(40, "finished")]
    graftlm.train(points[0].recipe, tmp_path / "unbroken")
    ours, theirs = (folder / "adapter_model.safetensors" for folder in (out / name, tmp_path / "unbroken"))
    assert ours.read_bytes() == theirs.read_bytes()


# On Ray ----------------------------------------------------------------------------------------------------------


class FakeRay(ModuleType):
    """A cluster of this one process."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.options_of_tasks: list[dict[str, Any]] = []
        self.running = True
        self.breaks = 0
        self.exceptions = SimpleNamespace(
            TaskCancelledError=type("TaskCancelledError", (Exception,), {}), RayError=type("RayError", (Exception,), {})
        )

    def init(self, address: str, **rest: Any) -> None:
        if not self.running:
            raise ConnectionError("no cluster")

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def remote(self, function: Any) -> Any:
        def options(**settings: Any) -> Any:
            self.options_of_tasks.append(settings)
            return SimpleNamespace(remote=lambda *args, **kwargs: Task(function, args, kwargs))

        return SimpleNamespace(options=options)

    def wait(self, tasks: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return tasks[-1:], tasks[:-1]  # in an order of its own

    def get(self, task: Any) -> int:
        if task.cancelled:
            raise self.exceptions.TaskCancelledError
        if self.breaks:
            self.breaks -= 1
            raise self.exceptions.RayError("the machine is gone")
        code: int = task.function(*task.args, **task.named)
        return code

    def cancel(self, task: Any, force: bool) -> None:
        task.cancelled = True


class Task:
    def __init__(self, function: Any, args: Any, kwargs: Any) -> None:
        self.function, self.args, self.named, self.cancelled = function, args, kwargs, False


def test_on_ray_the_same_recipe_leaves_the_same_table(
    recipe: Path, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = grid(recipe, ["r=2,4", "seed=0..1", "threads=2"])
    sweep(points, tmp_path / "local", say=lambda line: None)
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    ray.breaks = 1
    outcome = sweep(points, tmp_path / "ray", on="ray", say=lambda line: None)
    assert outcome.failed == {points[3].name: "the machine is gone"}
    outcome = sweep(points, tmp_path / "ray", on="ray", say=lambda line: None)
    assert (len(outcome.skipped), len(outcome.done)) == (3, 1)
    assert compare([tmp_path / "ray"]).rows() == compare([tmp_path / "local"]).rows()
    assert all(each["num_cpus"] == 2 and each["num_gpus"] == 0 for each in ray.options_of_tasks)


def test_on_ray_ctrl_c_cancels_what_runs_and_what_waits(
    recipe: Path, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    trainer.then = lambda: os.kill(os.getpid(), signal.SIGINT)
    outcome = sweep(grid(recipe, ["seed=0..2"]), tmp_path / "out", on="ray", say=lambda line: None)
    assert outcome == Outcome(done=["seed=2"])


def test_ray_that_is_not_there_is_said_with_what_to_do(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = grid(recipe, ["seed=0..1"])
    monkeypatch.setitem(sys.modules, "ray", None)
    with raises("training/missing-package", match=r"pip install 'graftlm\[ray\]'"):
        sweep(points, tmp_path / "out", on="ray")
    ray = FakeRay()
    ray.running = False
    monkeypatch.setitem(sys.modules, "ray", ray)
    with raises("training/no-ray-cluster"):
        sweep(points, tmp_path / "out", on="ray")
    with raises("recipe/invalid-value", match="Did you mean 'local'"):
        sweep(points, tmp_path / "out", on="locl")
