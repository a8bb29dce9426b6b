"""A pytest plugin: the tests write nothing into the user's folders, and no packet leaves this machine.

The first process of a session makes a folder of its own, and an environment that points into it. Workers of
pytest-xdist and processes that tests start inherit both:

- $HOME is an empty folder. A file that is found there at the end fails the session.
- $GRAFT_CACHE is shared by all workers, so a base is converted once and the kernels are compiled once a session.
- `sitecustomize.py` beside this file reports the sockets of every Python process. An address outside of loopback is
  refused, and fails the session.

The environment is set when this module is imported, which is before torch and transformers read theirs.
"""

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOLDER = "GRAFT_TEST_FOLDER"
REDIRECTED = {"GRAFT_CACHE": "cache", "HOME": "home", "HF_HOME": "huggingface", "MPLCONFIGDIR": "matplotlib"}
"""Environment variable -> folder in the session's folder. Other libraries' caches are not what HOME is watched for."""
READS_HOME = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")


def is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def session_folder() -> Path:
    return Path(os.environ[FOLDER])


def _set_environment() -> None:
    folder = Path(tempfile.mkdtemp(prefix="graft-tests-"))
    os.environ[FOLDER] = str(folder)
    for variable, name in REDIRECTED.items():
        (folder / name).mkdir()
        os.environ[variable] = str(folder / name)
    for variable in READS_HOME:
        os.environ.pop(variable, None)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["GRAFT_TEST_SOCKETS"] = str(folder / "sockets")
    paths = [str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


if not is_worker():
    _set_environment()
if not hasattr(sys, "_graft_sockets_watched"):  # a worker has it from its start
    import tests.guards.sitecustomize  # noqa: F401


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Other workers wait meanwhile, and then find in the cache what this one put there."""
    with open(session_folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def written_into_home() -> list[str]:
    """The files and empty folders in the session's HOME."""
    home = session_folder() / "home"
    return sorted(
        str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir() or not any(path.iterdir())
    )


def sockets() -> list[str]:
    """What `sitecustomize.py` wrote: a line for each use of an address, by every process so far."""
    file = session_folder() / "sockets"
    return file.read_text().splitlines() if file.is_file() else []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In the first process, after the workers have ended."""
    if is_worker():
        return
    if written_into_home() or any(line.startswith("outside") for line in sockets()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    used = sockets()
    outside = [line for line in used if line.startswith("outside")]
    connections = sum("socket.connect " in line for line in used)
    terminalreporter.write_line(
        f"sockets: {connections} connections, {len(used)} addresses used, {len(outside)} outside of loopback"
    )
    for line in outside:
        terminalreporter.write_line(f"  {line}", red=True)
    for name in written_into_home():
        terminalreporter.write_line(f"written into the user's home: ~/{name}", red=True)


def pytest_unconfigure() -> None:
    if not is_worker():
        shutil.rmtree(session_folder(), ignore_errors=True)
