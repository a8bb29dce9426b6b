"""The versions of torch and transformers that graftlm is tested with, and what to say about others.

pyproject.toml allows more: a newer version usually works, and nobody should have to wait for a release of ours.
"""

from importlib import import_module

TESTED = {"torch": ("2.11", "2.14"), "transformers": ("5.20", "5.24")}
"""The oldest and the newest minor version with which the tests marked `versions` passed (docs/log.md)."""


def untested() -> str:
    """One line that names each installed version outside of TESTED; empty if there is none."""
    found = []
    for name, (oldest, newest) in TESTED.items():
        version = import_module(name).__version__
        if not _minor(oldest) <= _minor(version) <= _minor(newest):
            found.append(f"{name} {version} is not tested with graftlm ({oldest} to {newest} are)")
    return "; ".join(found)


def _minor(version: str) -> tuple[int, int]:
    """(2, 13) for "2.13.0+cpu"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
