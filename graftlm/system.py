"""The machine and the process: which platforms are supported, settings for the whole process, and the global state
that a call restores.

`import graftlm` changes nothing outside of the package: no environment variable, no setting of the C library. The
command line calls `tune_process`; a Python program may.
"""

import ctypes
import gc
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from graftlm.errors import PlatformError

# Platforms -----------------------------------------------------------------------------------------------------------


class PlatformSupport(NamedTuple):
    """What graftlm promises on a platform."""

    level: Literal["supported", "untested", "refused"]
    limits: tuple[str, ...] = ()
    """What does not work there, a sentence each."""


def platform_support() -> PlatformSupport:
    """What graftlm promises on this platform. README and docs/how-to/platforms.md state the same."""
    system, machine = platform.system(), platform.machine()
    if system == "Windows":
        why = "graftlm needs signals, resource limits and fsync of folders as POSIX has them. Use WSL 2, which is Linux"
        return PlatformSupport("refused", (why,))
    if system == "Linux" and machine in ("x86_64", "AMD64"):
        return PlatformSupport("supported")
    if system == "Linux":
        return PlatformSupport(
            "untested", ("bases are loaded in float32 by default, and the C++ kernels are for bfloat16",)
        )
    if system == "Darwin":
        return PlatformSupport(
            "untested",
            (
                "chat templates run without a memory limit; their time limit holds",
                "the C++ kernels are not built, and the GPU (MPS) is not used",
            ),
        )
    return PlatformSupport("untested", ("nothing is known about graftlm on this system",))


def require_supported_platform() -> None:
    """Raise PlatformError where graftlm cannot work."""
    support = platform_support()
    if support.level == "refused":
        raise PlatformError(
            f"{platform.system()} is not supported: {' '.join(support.limits)}", code="unsupported-system"
        )


# Settings of a process -----------------------------------------------------------------------------------------------

KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 128, "LRU_CACHE_CAPACITY": 64}
"""Environment variable -> compiled kernels that a cache may hold.

oneDNN compiles a kernel for every shape of a product; it and torch above it hold 1,024 of them each, at 0.6 MiB. All
layers of a pass share their shapes, but the next pack has others, so a small cache serves as well. Both variables are
read at the first product."""

UNTUNED_KERNEL_CACHE = 1024
"""What both caches hold where no variable says otherwise."""

ENVIRONMENT = {
    **{name: str(capacity) for name, capacity in KERNEL_CACHES.items()},
    "KINETO_LOG_LEVEL": "9",  # else torch's profiler says on standard error that it starts and stops
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""What `tune_process` sets, where the user has not."""


MALLOC = {"MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1), "MALLOC_MMAP_THRESHOLD_": (-3, 2**25)}
"""glibc's variable -> (option of mallopt, the largest value that it takes)."""


def tune_process() -> None:
    """Set this process up as the command line does. Call it before torch and transformers are imported.

    1. Environment variables of `ENVIRONMENT` that are not set yet: smaller caches of compiled kernels (up to 600 MiB
       less memory), no log lines of the profiler, no telemetry of the Hugging Face libraries.
    2. glibc keeps freed memory for the next step and does not return it to the system in between, where each of its
       pages would be cleared anew: some 4 % of a step. glibc's own variables, where the user has set them, win.

    Both hold for the whole process and for the processes that it starts (1) or for this process alone (2).
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        for name, (option, size) in MALLOC.items():
            if name not in os.environ:
                libc.mallopt(option, size)


def kernel_cache_capacity() -> int:
    """Compiled kernels that oneDNN or torch may hold in this process: the larger cache counts."""

    def capacity(name: str) -> int:
        value = os.environ.get(name, "")
        return int(value) if value.isdecimal() else UNTUNED_KERNEL_CACHE

    return max(map(capacity, KERNEL_CACHES))


@contextmanager
def preserve_global_state() -> Iterator[None]:
    """Restore torch's global generators (CPU, and CUDA where it is in use) and its number of threads afterwards.

    Also a decorator. Use it around whatever calls `torch.manual_seed` or `torch.set_num_threads`: both belong to the
    program that calls us. Python's `random` and numpy's global generator are not touched by graftlm.
    """
    import torch  # so that this module does not import it

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


# The machine ---------------------------------------------------------------------------------------------------------

PROCESSOR_FLAGS = (
    *("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "bf16", "sve", "i8mm"),  # ARM's
)
"""The instructions that decide which kernels are fast."""


class Processor(NamedTuple):
    name: str
    flags: tuple[str, ...]
    """The entries of PROCESSOR_FLAGS that it has, as far as the system reports them."""
    cores: int
    """Logical cores of the machine."""
    usable_cores: int
    """Cores that this process may run on."""


def processor() -> Processor:
    """The processor of this machine: from /proc/cpuinfo, on macOS from sysctl."""
    info = _read("/proc/cpuinfo")
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    name = fields.get("model name") or platform.processor()
    if sys.platform == "darwin":
        name = output("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else cores
    return Processor(
        name or platform.machine(), tuple(flag for flag in PROCESSOR_FLAGS if flag in flags), cores, usable
    )


class Memory(NamedTuple):
    total_gib: float
    free_gib: float
    """What a process could still take: caches of files count, since the system gives them up."""


def memory() -> Memory:
    """The memory of this machine, or what its container may have: from /proc and cgroups, on macOS from vm_stat."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    if sys.platform == "darwin":
        text = output("/usr/bin/vm_stat")
        pages = {key: int(count) for key, count in re.findall(r"Pages (free|inactive|speculative): +(\d+)", text)}
        size = re.search(r"page size of (\d+) bytes", text)
        if pages and size:
            free = sum(pages.values()) * int(size[1])
    elif found := re.search(r"MemAvailable: +(\d+) kB", _read("/proc/meminfo")):
        free = int(found[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdecimal() and used.isdecimal():  # "max" is no limit
        total, free = min(total, int(limit)), min(free, int(limit) - int(used))
    return Memory(total / 2**30, free / 2**30)


def peak_rss_gib() -> float:
    """The most memory that this process had resident at any time."""
    if (peak := resident_gib("VmHWM")) is not None:  # the other figure begins at that of who started us
        return peak
    import resource  # Windows has none, where this module must be imported to refuse it politely

    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def resident_gib(what: str) -> float | None:
    """VmRSS, what this process has resident now, or VmHWM, the most that it ever had; None where there is no /proc."""
    with suppress(OSError), open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 2**20
    return None


def return_freed_memory() -> None:
    """Give memory that was freed back to the system: glibc keeps it for more of the kind, and none may come.

    Without this the peak of a run is training plus evaluation, with it the larger of the two; and a quantized base
    holds on to as much again as it saved.
    """
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def output(*command: str) -> str:
    """What a command prints on standard output; nothing where it cannot be started."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (the caller's own)
    except OSError:
        return ""
    return process.stdout.strip()
