"""Where and with what a result was measured: every result.json carries this."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graftlm.system import memory, processor

PACKAGES = ("graftlm", "torch", "transformers", "peft", "trl")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions and commit."""
    found = processor()
    return {
        "processor": found.name,
        "cores": found.cores,
        "memory_gib": round(memory().total_gib),
        "bf16_products": [name for name in ("avx512_bf16", "amx_bf16") if name in found.flags],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name)) is not None},
        "commit": commit(),
    }


def peak_rss_gib() -> float:
    """The most memory that this process had resident. (`ru_maxrss` begins at what the one who started it had.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def commit() -> str:
    """The commit that was measured, with a + where the tree had changes."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def write_result(script: str, result: dict[str, Any]) -> None:
    """result.json beside the script that measured it."""
    file = Path(script).parent / "result.json"
    file.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {file}")
