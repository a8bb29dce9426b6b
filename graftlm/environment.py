"""What a bug report needs to know about this machine and installation: `graft env`. Nothing is sent anywhere."""

import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from graftlm import __version__, cache, system
from graftlm.files import cache_folder
from graftlm.kernels.cpu import compiler, unavailable
from graftlm.passes.autotune import stored_choices
from graftlm.plugins import plugins

PACKAGES = (
    *("torch", "transformers", "tokenizers", "datasets", "huggingface_hub", "safetensors", "numpy", "pydantic"),
    *("peft", "trl", "accelerate", "gguf", "bitsandbytes"),
)
"""Distributions whose version may explain a fault."""


def environment() -> dict[str, Any]:
    """Versions, platform, processor, memory, kernels, GPUs and cache of this installation, as JSON can hold them."""
    processor, memory, support = system.processor(), system.memory(), system.platform_support()
    return {
        "graftlm": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "plugins": [asdict(plugin) for plugin in plugins()],
        "platform": {"name": platform.platform(), "support": support.level, "limits": list(support.limits)},
        "processor": {
            "name": processor.name,
            "architecture": platform.machine(),
            "flags": list(processor.flags),
            "cores": processor.cores,
            "usable_cores": processor.usable_cores,
            "torch_threads": torch.get_num_threads(),
        },
        "memory_gib": {"total": round(memory.total_gib, 1), "free": round(memory.free_gib, 1)},
        "kernels": kernels(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cache": {
            "folder": str(cache_folder()),
            "bytes": {kind: sum(entry.bytes for entry in cache.entries((kind,))) for kind in cache.KINDS},
        },
    }


def kernels() -> dict[str, Any]:
    """What decides which kernels compute a step: the C++ compiler, whether it builds them, and what was measured."""
    words = compiler() or ()
    banner = system.output(*words, "--version") if words else ""
    return {
        "compiler": " ".join(words) or None,
        "compiler_version": banner.partition("\n")[0] or None,
        "unavailable": unavailable(torch.device("cpu"), torch.bfloat16),
        "choices": stored_choices(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    processor, memory, kernels, stored = (found[key] for key in ("processor", "memory_gib", "kernels", "cache"))
    sizes = ", ".join(f"{kind} {megabytes(count)}" for kind, count in stored["bytes"].items() if count) or "empty"
    parts = {
        "graftlm": found["graftlm"],
        "Python": f"{found['python']['version']} ({found['python']['executable']})",
        "packages": ", ".join(f"{name} {number}" for name, number in found["packages"].items()),
        "plugins": f"\n{'':13} ".join(map(_plugin_line, found["plugins"])) or "none",
        "platform": f"{found['platform']['name']}: {found['platform']['support']}",
        "processor": f"{processor['name']} ({' '.join([processor['architecture'], *processor['flags']])})",
        "cores": f"{processor['cores']}, {processor['usable_cores']} usable; torch uses "
        f"{processor['torch_threads']} threads",
        "memory": f"{memory['total']} GiB, {memory['free']} GiB free",
        "C++ compiler": f"{kernels['compiler']}: {kernels['compiler_version']}" if kernels["compiler"] else "none",
        "own kernels": kernels["unavailable"] or "available",
        "GPUs": ", ".join(found["gpus"]) or "none",
        "cache": f"{stored['folder']}: {sizes}",
    }
    choices = [
        f"{each['model']}, {each['threads']} threads: {'; '.join(each['operations'])}" for each in kernels["choices"]
    ]
    more = [*found["platform"]["limits"], *choices]
    return [f"{name:13} {what}" for name, what in parts.items()] + [f"{'':13} {line}" for line in more]


def _plugin_line(plugin: dict[str, str]) -> str:
    line = "{group}: {name} of {distribution} {version}".format_map(plugin)
    return f"{line}, BROKEN: {plugin['error']}" if plugin["error"] else line


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
