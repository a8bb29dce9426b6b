"""At any time one process writes to an output path, and the death of its owner frees it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from graftlm import lock
from graftlm.lock import Owner, lock_file, only_writer, this_process
from tests.errors import raises

HOLDS = """
import sys, time
from pathlib import Path
from graftlm.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(60)
"""

COMES_AND_GOES = """
import os, sys
from pathlib import Path
from graftlm.errors import OutputError
from graftlm.lock import only_writer
out, times, had = Path(sys.argv[1]), int(sys.argv[2]), 0
inside = out.with_name("inside")
while had < times:
    try:
        with only_writer(out):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another process is inside too
            had += 1
            os.unlink(inside)
    except OutputError:
        pass
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has the lock of tmp_path/out."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)


def owned_by(out: Path, owner: Owner) -> Path:
    """The lock file as that owner leaves it."""
    file = lock_file(out)
    file.write_text(json.dumps(owner._asdict()))
    return file


def test_a_second_writer_is_refused_in_one_line_that_names_the_first(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    with raises("output/folder-in-use") as raised, only_writer(tmp_path / "out"):
        pass
    message = str(raised.value)
    assert "\n" not in message
    assert f"process {holder.pid} on {this_process().host}" in message
    assert str(tmp_path / "out") in message


def test_two_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with only_writer(tmp_path / "out"), raises("output/folder-in-use"), only_writer(tmp_path / "out"):
        pass


def test_another_spelling_of_the_path_is_the_same_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    with only_writer(tmp_path / "real"):
        for other in (Path("real"), Path("link"), tmp_path / "x" / ".." / "real"):
            with raises("output/folder-in-use"), only_writer(other):
                pass


def test_nothing_is_left_and_missing_folders_are_made(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for _ in range(2):
        with only_writer(out):
            assert lock_file(out).is_file()
        assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_ends_with_its_process(
    number: signal.Signals, holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    holder.send_signal(number)
    holder.wait()
    with only_writer(tmp_path / "out"):
        pass
    assert not lock_file(tmp_path / "out").exists()


def test_of_many_processes_that_come_and_go_two_are_never_inside(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMES_AND_GOES, str(tmp_path / "out"), "50"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with raises("output/not-writable"), only_writer(tmp_path / "file" / "out"):
        pass


# Where flock is missing, or reaches one machine only -------------------------------------------------------------


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_living_process_of_this_machine_keeps_the_lock(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    with raises("output/folder-in-use", match=f"process {holder.pid}"), only_writer(tmp_path / "out"):
        pass


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_dead_process_does_not_keep_the_lock(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    with only_writer(tmp_path / "out"):
        pass
    assert not lock_file(tmp_path / "out").exists()


@pytest.mark.usefixtures("no_flock")
def test_without_flock_another_process_with_the_id_of_a_dead_one_does_not_keep_the_lock(tmp_path: Path) -> None:
    owned_by(tmp_path / "out", this_process()._replace(started="1"))
    with only_writer(tmp_path / "out"):
        pass


@pytest.mark.usefixtures("no_flock")
def test_without_flock_one_of_two_that_come_at_once_gets_the_lock(tmp_path: Path) -> None:
    """The other one writes its name after us, before either has looked again."""
    other = this_process()._replace(process=1, started=lock.started(1) or "")
    slept = time.sleep

    def and_another_comes(seconds: float) -> None:
        if not lock_file(tmp_path / "out").read_text().count('"process": 1,'):
            owned_by(tmp_path / "out", other)
        slept(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock.time, "sleep", and_another_comes)
        with raises("output/folder-in-use", match="process 1 on"), only_writer(tmp_path / "out"):
            pass


@pytest.mark.parametrize("flock", [True, False])
def test_an_owner_on_another_machine_is_watched(
    flock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not flock:
        request.getfixturevalue("no_flock")
    monkeypatch.setattr(lock, "WATCH", 1.0)
    out, messages = tmp_path / "out", list[str]()
    file = owned_by(out, Owner("node7", "another boot", 99, "5"))
    ended = Event()

    def lives() -> None:
        while not ended.wait(0.02):
            os.utime(file)

    thread = Thread(target=lives)
    thread.start()
    try:
        with raises("output/folder-in-use", match="process 99 on node7"), only_writer(out, say=messages.append):
            pass
    finally:
        ended.set()
        thread.join()
    assert len(messages) == 1
    assert file.exists()
    with only_writer(out, say=messages.append):  # it touches the file no more
        assert this_process().host in file.read_text()
    assert len(messages) == 2


def test_an_owner_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    touched = Event()
    monkeypatch.setattr(lock.os, "utime", lambda path: touched.set() if path == lock_file(tmp_path / "out") else None)
    with only_writer(tmp_path / "out"):
        assert touched.wait(10)
