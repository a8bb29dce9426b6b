"""One writer at a time: the lock of an output path, which a process holds as long as it writes there.

The lock of OUT is the file `.OUT.lock` beside it. The kernel keeps it (flock), so it ends with its process, however
that ends. The file names its owner, for what flock does not decide: file systems without flock, and network file
systems where flock reaches the processes of one machine only. There an owner on this machine is looked up by its
process; an owner on another machine is watched, for it touches the file every BEAT seconds.
"""

import errno
import fcntl
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from graftlm.errors import OutputError
from graftlm.files import writing

BEAT = 5.0
"""Seconds between two touches of the lock file by its owner."""

WATCH = 4 * BEAT
"""Seconds without a touch after which an owner on another machine counts as dead."""

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""The errors of flock on a file system that does not support it."""


class Owner(NamedTuple):
    """A process, so that no other process of any machine is the same."""

    host: str
    boot: str
    """The id that the machine got when it booted."""
    process: int
    started: str
    """When the process started, in the kernel's own unit: process ids are used again."""


def lock_file(out: Path) -> Path:
    """The lock of an output path; the same for every spelling of the path."""
    real = Path(os.path.realpath(out))
    return real.with_name(f".{real.name}.lock")


@contextmanager
def only_writer(out: Path, *, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Inside, this process alone writes to `out`. Raises OutputError where another one does, or the lock cannot be
    written. `say` gets a line when an owner on another machine has to be watched."""
    path = lock_file(out)
    with writing(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, out, say)
    ended = Event()
    beat = Thread(target=_beat, args=(path, ended), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        with suppress(OSError):
            if _is_at(handle, path):  # somebody may have removed the file by hand
                os.unlink(path)
        os.close(handle)


def _acquire(path: Path, out: Path, say: Callable[[str], None]) -> int:
    """A handle of the lock file, which holds the lock and names this process."""
    mine = this_process()
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _flock(handle)
            if not _is_at(handle, path):  # its owner removed it after it was opened here
                os.close(handle)
                continue
            owner = _owner(handle)
            if locked is False:
                raise OutputError(_in_use(out, owner), code="folder-in-use")
            if owner is not None and _lives(owner, mine, path, flock=locked is True, out=out, say=say):
                raise OutputError(_in_use(out, owner), code="folder-in-use")
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(mine._asdict()).encode(), 0)
            os.fsync(handle)
            if locked is None:  # two processes may have come so far: the one that wrote last has the lock
                time.sleep(0.5)
            if _is_at(handle, path) and _owner(handle) == mine:
                return handle
            os.close(handle)
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise


def _flock(handle: int) -> bool | None:
    """Whether this handle has the lock now; None on a file system without flock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in NO_FLOCK:
            return None
        raise
    return True


def _lives(owner: Owner, mine: Owner, path: Path, *, flock: bool, out: Path, say: Callable[[str], None]) -> bool:
    """Whether the owner that the lock file names still runs. `flock`: no process of this machine has the lock."""
    if owner.boot == mine.boot and flock:
        return False
    if (owner.host, owner.boot) == (mine.host, mine.boot):
        return started(owner.process) == owner.started
    say(f"{out}: process {owner.process} on {owner.host} wrote here: {WATCH:.0f} s to see whether it still runs")
    first_touch, until = _touched(path), time.monotonic() + WATCH
    while time.monotonic() < until:
        time.sleep(min(1.0, WATCH / 10))
        if (now := _touched(path)) != first_touch:
            return now is not None
    return False


def _in_use(out: Path, owner: Owner | None) -> str:
    who = f"process {owner.process} on {owner.host}" if owner else "another process"
    return f"{out}: {who} writes here: wait until it ends, or choose another folder"


def _owner(handle: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(handle, 4096, 0)))
    except (ValueError, TypeError):  # an owner that has just come, or was killed while it came
        return None


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _touched(path: Path) -> int | None:
    """When the file was last touched; None where there is none. Opened first, because NFS then asks its server."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(handle).st_mtime_ns
    finally:
        os.close(handle)


def _beat(path: Path, ended: Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


# Who is who ------------------------------------------------------------------------------------------------------


def this_process() -> Owner:
    return Owner(socket.gethostname(), _boot(), os.getpid(), started(os.getpid()) or "")


def started(process: int) -> str | None:
    """When a process of this machine started; "" where the system does not say it; None where none such runs."""
    if platform.system() == "Linux":
        try:
            state, *others = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else others[18]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _boot() -> str:
    if platform.system() == "Linux":
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]  # macOS
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
