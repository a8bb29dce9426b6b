"""A run that is stopped, killed or starved at any instant ends in the very bytes of one that was not."""

import datetime
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig

import graftlm
import graftlm.run as run_module
import graftlm.training.checkpoints as checkpoint
from graftlm.config.schema import build, to_yaml
from graftlm.config.trees import differences
from graftlm.data.chat import render
from graftlm.errors import GraftError
from graftlm.recipe import Recipe
from graftlm.testing.tiny import CHATML, save_tiny_base
from graftlm.training import run_folder
from graftlm.training.checkpoints import FACTS, MANIFEST, STATE
from tests.errors import raises
from tests.test_run import adapter

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("without_pictures")]
STEPS = 6


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["red", "green", "blue", "seven", "eleven", "one", "two", "apple", "pear", "sky", "sea"]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"say {words[n % 11]}"},
                      {"role": "assistant", "content": " ".join(words[n % 11 :][: 1 + n % 7])}]}
        for n in range(24)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe(base: Path, rows: Path, **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "base": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "held_out": 3},
        "delta": {"method": "lora", "r": 4, "dropout": 0.2},
        "train": {"steps": STEPS, "batch_rows": 4, "pack_tokens": 64, "seed": 3, "save_every": 2}
        | {"learning_rate": 0.01},
        "report": {"samples": 1, "answers": 1, "max_new_tokens": 2},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return build(Recipe, tree, source="test")


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def same(out: Path, other: Path) -> None:
    assert losses(out) == losses(other)
    files = sorted(path.relative_to(other) for path in other.rglob("adapter_model.safetensors"))
    assert files
    for file in files:
        assert (out / file).read_bytes() == (other / file).read_bytes()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    assert not (out / "checkpoints" / "unfinished.json").exists()


@pytest.fixture(scope="module")
def unbroken(base_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    graftlm.train(recipe(base_folder, rows), out)
    return out


def stopping_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a signal had come during that step."""

    class Later:
        calls = 0

        @property
        def requested(self) -> bool:
            self.calls += 1
            return self.calls >= steps

    from contextlib import contextmanager

    @contextmanager
    def soon() -> Iterator[Later]:
        yield Later()

    monkeypatch.setattr(run_module, "stop_on_signal", soon)


@pytest.mark.parametrize("after", [1, pytest.param(2, marks=pytest.mark.versions), 5])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    after: int, base_folder: Path, rows: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopping_after(after, patch)
        result = graftlm.train(recipe(base_folder, rows), out)
    assert result.summary["interrupted"] is True
    assert result.summary["train"]["steps"] == after
    model, _ = graftlm.load_base(str(base_folder))
    graftlm.load_adapter(model, out)
    summary = graftlm.train(recipe(base_folder, rows), out, resume=True).summary
    assert "interrupted" not in summary
    assert summary["train"]["steps"] == STEPS
    same(out, unbroken)


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_that_was_begun_with_the_key_store_is_refused(
    finished: bool, base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made = tmp_path / "out", recipe(base_folder, rows)
    with monkeypatch.context() as patch:
        stopping_after(1, patch)
        graftlm.train(made, out)
    if finished:
        graftlm.train(made, out, resume=True)
    file = out / "recipe.yaml" if finished else out / "checkpoints" / "unfinished.json"
    tree = yaml.safe_load(file.read_text())
    del tree["base"]["dtype"], tree["base"]["quantization"]
    tree["base"]["store"] = "fp32"
    file.write_text(json.dumps(tree))
    with pytest.raises(GraftError, match="replaced by dtype" if finished else "whose recipes had base.store"):
        graftlm.train(made, out, resume=True)


def test_a_stopped_run_leaves_what_its_callbacks_would_leave_and_goes_on_from_where_it_was(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three, whole, out = (tmp_path / name for name in ("three", "whole", "out"))
    ema = recipe(base_folder, rows, callbacks=[{"name": "ema", "decay": 0.5}], train__save_every=1)
    graftlm.train(ema, whole)
    for made, folder in ((ema, out), (recipe(base_folder, rows), three)):
        with monkeypatch.context() as patch:
            stopping_after(3, patch)
            graftlm.train(made, folder)
    plain, averaged = (load_file(folder / "adapter_model.safetensors") for folder in (three, out))
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain), (
        "the mean of three steps is not the third"
    )
    state = load_file(out / "checkpoints" / "step-00000003" / "state.safetensors")
    means = sorted(float(t.double().sum()) for name, t in state.items() if name.startswith("callback/ema/"))
    assert sorted(float(tensor.double().sum()) for tensor in averaged.values()) == pytest.approx(means)
    graftlm.train(ema, out, resume=True)
    same(out, whole)


def test_stopped_at_every_step_in_turn(
    base_folder: Path, rows: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopping_after(1, patch)
        for step in range(1, STEPS):
            assert graftlm.train(recipe(base_folder, rows), out, resume=True).summary["train"]["steps"] == step
    graftlm.train(recipe(base_folder, rows), out, resume=True)
    same(out, unbroken)


SEVERAL = {"a": {"method": "lora", "r": 2, "init": "pissa"}, "b": {"method": "dora", "r": 2}}


@pytest.mark.sampled
@pytest.mark.parametrize(
    "changes",
    [
        {"delta": {"method": "lora", "r": 2, "init": "pissa"}},
        {"delta": {"method": "lora", "r": 2, "init": "lora-ga"}},
        {"delta": {"method": "vera", "r": 8}},
        {"delta": {"method": "mora", "r": 4}},
        {"delta": None, "deltas": SEVERAL},
        {"delta": None, "deltas": SEVERAL, "train__in_turn": True},
        {"delta": {"method": "prefix"}},
        {"callbacks": ["lora-plus"]},
        {"data__pack": False, "train__checkpointing": True},
    ],
    ids=str,
)
def test_whatever_is_trained_resumes_exactly(
    changes: dict[str, Any], base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(base_folder, rows, **changes)
    graftlm.train(made, tmp_path / "whole")
    with monkeypatch.context() as patch:
        for after in (3, 1):
            stopping_after(after, patch)
            graftlm.train(made, tmp_path / "out", resume=True)
    graftlm.train(made, tmp_path / "out", resume=True)
    same(tmp_path / "out", tmp_path / "whole")


def test_resuming_starts_fresh_where_there_is_nothing_and_does_nothing_where_all_is_done(
    base_folder: Path, rows: Path, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    graftlm.train(recipe(base_folder, rows), out, resume=True)
    same(out, unbroken)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = graftlm.train(recipe(base_folder, rows), out, resume=True)
    assert again.summary["train"]["steps"] == STEPS
    assert again.model is None
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_last_checkpoints_are_kept(unbroken: Path) -> None:
    assert sorted(path.name for path in (unbroken / "checkpoints").iterdir()) == [
        "metrics.jsonl", "step-00000004", "step-00000006",
    ]  # fmt: skip


# Recipes that change ---------------------------------------------------------------------------------------------


def stopped(base: Path, rows: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int = 5) -> None:
    with monkeypatch.context() as patch:
        stopping_after(after, patch)
        graftlm.train(recipe(base, rows), out)


def test_a_changed_recipe_is_refused_with_the_difference(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped(base_folder, rows, out, monkeypatch)
    other = recipe(base_folder, rows, train__learning_rate=0.02)
    with raises("output/other-recipe", match=r"train.learning_rate: 0.01 -> 0.02") as raised:
        graftlm.train(other, out, resume=True)
    assert "--accept-changes" in str(raised.value)
    with raises("output/unfinished-run"):
        graftlm.train(other, out)
    assert graftlm.train(other, out, resume=True, accept_changes=True).summary["train"]["steps"] == STEPS
    rates = [json.loads(line)["learning_rate"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    fresh = tmp_path / "fresh"
    graftlm.train(other, fresh)
    wanted = [json.loads(line)["learning_rate"] for line in (fresh / "metrics.jsonl").read_text().splitlines()]
    assert rates[:5] == [rate / 2 for rate in wanted[:5]]
    assert rates[5:] == wanted[5:]


def test_what_says_nothing_of_learning_may_change(
    base_folder: Path, rows: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped(base_folder, rows, out, monkeypatch)
    graftlm.train(recipe(base_folder, rows, train__save_every=1, report__samples=0), out, resume=True)
    same(out, unbroken)


def test_other_rows_under_the_same_name_are_refused(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = shutil.copy(rows, tmp_path / "rows.jsonl")
    stopped(base_folder, mine, tmp_path / "out", monkeypatch)
    mine.write_text(mine.read_text().replace("apple", "grape"))
    with raises(
        "training/dependencies-changed", match=r"training rows: \w{12} -> \w{12}; .*rows.jsonl was edited: \w+ -> \w+"
    ):
        graftlm.train(recipe(base_folder, mine), tmp_path / "out", resume=True)


def test_a_run_goes_on_after_its_data_and_base_were_moved(
    base_folder: Path, rows: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    mine, base = shutil.copy(rows, tmp_path / "old"), shutil.copytree(base_folder, tmp_path / "old" / "base")
    out = tmp_path / "out"
    stopped(base, mine, out, monkeypatch)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = recipe(tmp_path / "new" / "base", tmp_path / "new" / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    graftlm.train(moved, out, resume=True)
    same(out, unbroken)
    assert graftlm.train(recipe(tmp_path / "new" / "base", Path("new/rows.jsonl")), out, resume=True).model is None
    (tmp_path / "new" / "other.jsonl").write_text((tmp_path / "new" / "rows.jsonl").read_text() * 2)
    with raises("output/other-recipe", match="data.train"):
        graftlm.train(recipe(tmp_path / "new" / "base", tmp_path / "new" / "other.jsonl"), out, resume=True)


def test_a_run_goes_on_after_transformers_added_a_key_to_the_config(
    base_folder: Path, rows: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped(base_folder, rows, out, monkeypatch)
    real = LlamaConfig.to_dict
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda self: {**real(self), "a_new_key": 1})
    graftlm.train(recipe(base_folder, rows), out, resume=True)
    same(out, unbroken)


def test_another_base_of_the_same_name_is_refused_with_what_differs(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    stopped(base, rows, tmp_path / "out", monkeypatch)
    save_tiny_base(base, seed=1)
    with raises("training/dependencies-changed", match=r"base: \w{12} -> \w{12}; \d+ of \d+ weights differ"):
        graftlm.train(recipe(base, rows), tmp_path / "out", resume=True)


def test_another_chat_template_is_named_as_the_cause(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    stopped(base, rows, tmp_path / "out", monkeypatch)
    save_tiny_base(base, template=CHATML.replace("<|im_end|>\\n", "<|im_end|>\\n\\n"))
    with raises("training/dependencies-changed", match=r"the chat template .*\w{12} -> \w{12}"):
        graftlm.train(recipe(base, rows), tmp_path / "out", resume=True)


def test_differences_are_said_by_key() -> None:
    before, after = {"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1]}, "d": None, "e": "x"}
    assert differences(before, after) == ["a.b: 1 -> 2", 'e: (not there) -> "x"']


# Damage ----------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.sampled
@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
@pytest.mark.parametrize("name", [STATE, FACTS, MANIFEST])
def test_of_a_damaged_checkpoint_the_file_is_named_and_the_one_before_is_taken(
    name: str,
    damage: Callable[[Path], None],
    base_folder: Path,
    rows: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    stopped(base_folder, rows, out, monkeypatch)
    damage(out / "checkpoints" / "step-00000005" / name)
    messages: list[str] = []
    real: Any = run_module.RunFolder.newest
    monkeypatch.setattr(
        run_module.RunFolder, "newest", lambda self, facts, **_: real(self, facts, report=messages.append)
    )
    graftlm.train(recipe(base_folder, rows), out, resume=True)
    assert len(messages) == 1
    assert f"step-00000005/{name} is damaged" in messages[0]
    same(out, unbroken)


def test_where_every_checkpoint_is_damaged_the_run_does_not_start_anew_by_itself(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped(base_folder, rows, out, monkeypatch)
    for file in out.rglob(STATE):
        flip(file)
    with raises("training/no-usable-checkpoint") as raised:
        graftlm.train(recipe(base_folder, rows), out, resume=True)
    assert "--overwrite" in str(raised.value)
    assert graftlm.train(recipe(base_folder, rows), out, overwrite=True).summary["train"]["steps"] == STEPS


# Death at every operation ----------------------------------------------------------------------------------------

DIES = """
import os, sys, shutil
from pathlib import Path
import safetensors.torch, graftlm.training.checkpoints as checkpoint
left = int(sys.argv[1])
real_write = Path.write_text

def dying(real):
    def called(*given, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return real(*given, **named)
    return called

os.fsync, os.rename, os.unlink = dying(os.fsync), dying(os.rename), dying(os.unlink)
Path.rename = lambda self, target: (os.rename(self, target), Path(target))[1]
Path.write_text = dying(Path.write_text)
checkpoint.save_file = dying(checkpoint.save_file)
shutil.rmtree = dying(shutil.rmtree)
import torch
torch.set_num_threads(1)
import graftlm
graftlm.train(sys.argv[2], sys.argv[3], resume=True)
print("operations:", int(sys.argv[1]) - left)
"""


@pytest.mark.parametrize(
    "apart", [pytest.param(17, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.long(group="kill"))]
)
def test_killed_at_writes_syncs_and_renames_it_goes_on_to_the_same_bytes(
    apart: int, base_folder: Path, rows: Path, unbroken: Path, tmp_path: Path
) -> None:
    """A process dies at its first operation, the one that resumes at its 18th (in the long test: at its second) ..."""
    made = tmp_path / "recipe.yaml"
    made.write_text(to_yaml(recipe(base_folder, rows)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(dies_at: int, out: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", DIES, str(dies_at), str(made), str(out)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    whole = run(10**6, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    count = int(whole.stdout.rpartition("operations:")[2])
    same(tmp_path / "whole", unbroken)
    assert count > 40
    out, deaths, at = tmp_path / "out", 0, 1
    while (done := run(at, out)).returncode == -signal.SIGKILL:
        deaths, at = deaths + 1, at + apart  # dies again and again on the way, later each time
    assert done.returncode == 0, done.stderr
    assert deaths > 2
    same(out, unbroken)


# A disk that is full, a place that is closed ---------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("at", range(1, 9))
def test_a_full_disk_is_said_with_path_and_bytes_and_loses_nothing(
    at: int, base_folder: Path, rows: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    calls = 0

    def full(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 8:  # in the second checkpoint: the first takes eight of these
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        for name in ("save_file", "sync"):
            patch.setattr(checkpoint, name, full(getattr(checkpoint, name)))
        with raises("output/no-space-left") as raised:
            graftlm.train(recipe(base_folder, rows), out)
    assert "step-0000000" in str(raised.value)
    assert "bytes" in str(raised.value)
    assert not list((out / "checkpoints").glob(".*"))
    graftlm.train(recipe(base_folder, rows), out, resume=True)
    same(out, unbroken)


def test_of_a_run_that_fails_before_its_first_checkpoint_nothing_is_left(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with raises("output/no-space-left"):
        graftlm.train(recipe(base_folder, rows), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_being_replaced_stays_until_the_new_one_is_whole(
    base_folder: Path, rows: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    graftlm.train(recipe(base_folder, rows, train__seed=9), out)
    before = adapter(out)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "new_folder", fails)
        with pytest.raises(RuntimeError):
            graftlm.train(recipe(base_folder, rows), out, overwrite=True)
    assert adapter(out) == before
    graftlm.train(recipe(base_folder, rows), out, resume=True)
    same(out, unbroken)


def test_a_batch_that_is_not_finite_stops_and_may_be_left_out_on_resuming(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.Tensor.backward
    calls = 0

    def poisoned(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        real(self * float("nan") if calls == 4 else self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", poisoned)
        with raises("training/not-finite"):
            graftlm.train(recipe(base_folder, rows, train__pack_tokens=10_000), tmp_path / "out")
    assert (tmp_path / "out" / "checkpoints" / "step-00000003").is_dir()
    summary = graftlm.train(
        recipe(base_folder, rows, train__pack_tokens=10_000, train__on_nonfinite="skip"), tmp_path / "out", resume=True
    ).summary
    assert summary["train"]["steps"] == STEPS


def on(day: str, patch: pytest.MonkeyPatch) -> None:
    """As if it were that day, for the run and for its chat template."""
    moment = datetime.datetime.fromisoformat(f"{day}T23:50:00")

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return moment

    class Today(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return moment.date()

    patch.setattr(run_folder, "datetime", SimpleNamespace(datetime=Frozen))
    patch.setattr(render, "datetime", SimpleNamespace(date=Today))


def test_a_run_that_goes_on_after_midnight_stays_in_its_day(
    base_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}\n" + CHATML)
    dated = recipe(base_folder, rows, base__template=str(template))
    with monkeypatch.context() as patch:
        on("2026-03-01", patch)
        graftlm.train(dated, tmp_path / "unbroken")
        stopping_after(3, patch)
        graftlm.train(dated, tmp_path / "out")
    on("2026-03-02", monkeypatch)
    graftlm.train(dated, tmp_path / "out", resume=True)
    same(tmp_path / "out", tmp_path / "unbroken")
    graftlm.train(dated, tmp_path / "other")
    assert losses(tmp_path / "other") != losses(tmp_path / "unbroken"), "the date is a part of the rows"
