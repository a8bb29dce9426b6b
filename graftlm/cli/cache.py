"""`graft cache list` and `graft cache clear`."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from graftlm.cli.options import JsonOption, check_choice
from graftlm.cli.terminal import print_json

if TYPE_CHECKING:
    from graftlm.cache import CacheEntry


KindOption = Annotated[
    list[str] | None,
    typer.Option("--kind", help="bases, fingerprints, kernels, rows or scores. Repeat the option for several."),
]


def list_entries(as_json: JsonOption = False) -> None:
    """List the cache by kind: entries, size and age."""
    from graftlm import cache
    from graftlm.files import cache_folder

    found, others = cache.entries(), cache.others()
    if as_json:
        tree = [entry._asdict() | {"path": str(entry.path)} for entry in found]
        print_json({"folder": str(cache_folder()), "entries": tree, "others": [str(p) for p in others]})
        return
    print(cache_folder())
    for kind, about in cache.KINDS.items():
        print(f"{kind:13} {_size_and_age([entry for entry in found if entry.kind == kind]):42} {about.holds}")
    for path in others:
        print(f"not written by graftlm, not removed: {path}")


def clear(
    kind: KindOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Remove cache entries, all of them or some kinds. They are made again when they are needed."""
    from graftlm import cache
    from graftlm.files import cache_folder

    kinds = tuple(dict.fromkeys(kind or cache.KINDS))
    for each in kinds:
        check_choice(each, cache.KINDS, "--kind")
    found = cache.entries(kinds)
    if not found:
        print(f"nothing to remove in {cache_folder()}")
        return
    for each in kinds:
        if of_kind := [entry for entry in found if entry.kind == each]:
            print(f"{each:13} {_size_and_age(of_kind)}")
    if not yes:
        typer.confirm(f"Remove these from {cache_folder()}?", abort=True)
    cache.clear(found)
    print(f"removed {len(found)} entries")


def _size_and_age(found: "Sequence[CacheEntry]") -> str:
    if not found:
        return "empty"
    from graftlm.environment import megabytes

    ages = sorted((time.time() - entry.modified) / 86400 for entry in found)
    days = f"{ages[0]:.0f}" if round(ages[0]) == round(ages[-1]) else f"{ages[0]:.0f} to {ages[-1]:.0f}"
    entries = "1 entry" if len(found) == 1 else f"{len(found)} entries"
    return f"{entries}, {megabytes(sum(entry.bytes for entry in found))}, {days} days old"
