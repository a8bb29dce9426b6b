"""Two processes that start the same run: one trains, the other is refused, and the run is that of one process alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import graftlm
from graftlm.config.schema import to_yaml
from graftlm.lock import lock_file, only_writer
from graftlm.runs.sweep import Point, sweep
from tests.errors import raises
from tests.training.test_resume import losses, recipe, same

pytestmark = pytest.mark.usefixtures("without_pictures")

TWICE = """
import json, os, sys, time
from pathlib import Path

import torch
torch.set_num_threads(1)
import graftlm
from graftlm.errors import GraftError

made, work, shares, first, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])

def start(out, said):
    if child := os.fork():
        return child
    try:
        found = graftlm.train(made, out, resume=True)
        os._exit(0 if found.model is not None else 5)  # 5: it found a finished run
    except GraftError as error:
        said.write_text(str(error))
        os._exit(3)
    except BaseException as error:
        said.write_text(repr(error))
    finally:
        os._exit(4)

def code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert code(start(work / "warm", work / "said")) == 0
begun = time.monotonic()
assert code(start(work / "whole", work / "said")) == 0
takes = time.monotonic() - begun
found = []
for number in range(first, first + count):
    out, files = work / f"out{number}", [work / f"said{number}-{n}" for n in range(2)]
    one = start(out, files[0])
    time.sleep(0.9 * takes * number / shares)
    two = start(out, files[1])
    codes = [code(one), code(two)]
    found.append({"number": number, "codes": codes, "said": [file.read_text() for file in files if file.exists()]})
    for file in files:
        file.unlink(missing_ok=True)
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("steps", "shares", "first", "count"),
    [
        pytest.param(20, 2, 0, 2, marks=pytest.mark.slow),
        pytest.param(40, 20, 0, 20, marks=pytest.mark.slow),
        *(
            pytest.param(400, 200, first, 20, marks=pytest.mark.long(group="double-start"))
            for first in range(0, 200, 20)
        ),
    ],
)
def test_one_of_two_starts_trains_and_the_other_is_refused(
    steps: int, shares: int, first: int, count: int, base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    """The second start comes at `count` instants of `shares` that are spread over the time of a run."""
    made = tmp_path / "recipe.yaml"
    made.write_text(to_yaml(recipe(base_folder, rows, train__steps=steps)))
    command = [sys.executable, "-c", TWICE, str(made), str(tmp_path), str(shares), str(first), str(count)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == count
    assert any(3 in each["codes"] for each in found)
    for each in found:
        out = tmp_path / f"out{each['number']}"
        assert sorted(each["codes"]) in ([0, 3], [0, 5]), each  # 5 where the second came after the first had ended
        for message in each["said"]:
            assert "\n" not in message
            assert str(out) in message
            assert "writes here" in message
        assert len(losses(out)) == steps
        same(out, tmp_path / "whole")


@pytest.mark.slow
def test_the_command_line_refuses_a_second_start_in_one_line(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    made, out = tmp_path / "recipe.yaml", tmp_path / "out"
    made.write_text(to_yaml(recipe(base_folder, rows)))
    command = [sys.executable, "-m", "graftlm", "train", str(made), "--out", str(out), "--resume"]
    with only_writer(out):
        done = subprocess.run(command, capture_output=True, text=True)
        assert lock_file(out).is_file()
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error[output/folder-in-use]: {out}: process {os.getpid()} on {os.uname().nodename} writes here: "
        "wait until it ends, or choose another folder"
    ]
    assert not out.exists()


def test_a_finished_run_is_not_touched_while_another_process_writes_there(
    base_folder: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    graftlm.train(recipe(base_folder, rows), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with only_writer(out):
        for options in ({"resume": True}, {"overwrite": True}):
            with raises("output/folder-in-use"):
                graftlm.train(recipe(base_folder, rows), out, **options)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_second_sweep_into_the_same_folder_is_refused(base_folder: Path, rows: Path, tmp_path: Path) -> None:
    points = [Point("run", recipe(base_folder, rows))]
    with only_writer(tmp_path / "sweep"), raises("output/folder-in-use"):
        sweep(points, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
