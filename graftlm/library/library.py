"""A library: a folder of adapters, and `library.json`, the index of them.

    DIR/library.json        {"format": 1, "adapters": {NAME: entry}}
    DIR/NAME/               an adapter (`entry.py`)
    DIR/.removed/NAME/      an adapter that was taken out
    DIR/.drafts/            what is being copied, or was when a process died

The folders are the truth: an entry follows from its folder, and the index from the entries. So an index that is lost
is made again, and `graft serve --adapters DIR` needs none. The index is what files are compared with.
"""

import datetime
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.folder import (
    CONFIG,
    HEADS,
    RECIPE,
    RECORD,
    SUMMARY,
    TEMPLATE,
    TOKENIZER,
    WEIGHTS,
    read_record,
    sha256_of,
)
from graftlm.adapters.tensors import check_numbers
from graftlm.config.schema import to_tree
from graftlm.errors import AdapterError, BaseModelError, GraftError, OutputError, nearest
from graftlm.files import sync, whole, writing
from graftlm.generation.checked_adapter import checked_name
from graftlm.hub.fingerprint import Fingerprint, difference
from graftlm.library.entry import ABOUT, EXAMPLES, About, Entry, Score, digests_of, entry_of, from_tree
from graftlm.lock import only_writer
from graftlm.training.checkpoints import FOLDER, Checkpoints

INDEX, REMOVED, DRAFTS = "library.json", ".removed", ".drafts"
FORMAT = 1
COPIED = (CONFIG, WEIGHTS, HEADS, RECORD, TEMPLATE, *TOKENIZER, RECIPE, SUMMARY, "README.md")
"""Patterns of what is copied of an adapter's folder; checkpoints, metrics and reports of a run are not."""
PATIENCE = 60.0
"""Seconds that a process waits for another one that writes to the library."""


@dataclass(frozen=True)
class Library:
    """The adapters of a folder."""

    folder: Path
    entries: Mapping[str, Entry]
    """By name, in the order of the alphabet."""
    problems: Sequence[str] = ()
    """What is wrong with the folder, so far as that is seen without reading the adapters."""

    def path(self, name: str) -> Path:
        return self.folder / name

    def named(self, names: Sequence[str]) -> dict[str, Entry]:
        """The entries of these names; AdapterError for a name that is none."""
        for name in names:
            if name not in self.entries:
                raise AdapterError(
                    f"{self.folder} has no adapter {name!r}. {nearest(name, self.entries)}", code="not-in-library"
                )
        return {name: self.entries[name] for name in names}

    def bases(self) -> set[str]:
        """The fingerprints of the bases, so far as they are known."""
        return {entry.base_fingerprint for entry in self.entries.values() if entry.base_fingerprint is not None}


class Finding(NamedTuple):
    """Something that is wrong with an adapter of a library, or with its index."""

    name: str
    why: str


# Reading ----------------------------------------------------------------------------------------------------------


def read_library(folder: str | Path) -> Library:
    """The library in a folder by its index; without an index, by its folders.

    Raises AdapterError for a folder that is not there, and for an index that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        near = [str(path) for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise AdapterError(f"{folder}: no such library. {nearest(str(folder), near)}", code="no-such-folder")
    if not (folder / INDEX).is_file():
        found = scan(folder)
        return replace(found, problems=[f"no {INDEX}: made from the folders", *found.problems])
    entries, there = _indexed(folder), _adapters_in(folder)
    problems = [f"{name} is not in the index" for name in there if name not in entries]
    problems += [f"{name} is in the index, and its folder is gone" for name in entries if name not in there]
    return Library(folder, entries, problems)


def scan(folder: Path) -> Library:
    """The library that the folders are, whatever the index says. An adapter that cannot be read is a problem."""
    entries, problems = {}, []
    for name, path in _adapters_in(folder).items():
        try:
            entries[checked_name(name, set())] = entry_of(path)
        except GraftError as error:
            problems.append(str(error))
    return Library(folder, entries, problems)


def _adapters_in(folder: Path) -> dict[str, Path]:
    """The folders of adapters by name, in the order of the alphabet."""
    found = (file.parent for file in folder.glob(f"*/{CONFIG}"))
    return {path.name: path for path in sorted(found) if not path.name.startswith(".")}


def _indexed(folder: Path) -> dict[str, Entry]:
    file = folder / INDEX
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{file}: cannot be read: {error}. Remove it: `graft library verify {folder} --repair` makes it from the "
            "folders",
            code="unreadable-index",
        ) from None
    adapters = tree.get("adapters") if isinstance(tree, dict) else None
    if not isinstance(adapters, dict) or tree.get("format") != FORMAT:
        raise AdapterError(
            f"{file}: this is no index of format {FORMAT}. It is of another version of graftlm, or was edited: remove "
            f"it, and `graft library verify {folder} --repair` makes it from the folders",
            code="unreadable-index",
        )
    return {name: from_tree(Entry, adapters[name], file) for name in sorted(adapters)}


# Writing ----------------------------------------------------------------------------------------------------------


def write_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Put an index in the place of the one that is there, whole or not at all. The caller has the lock."""
    tree = {"format": FORMAT, "adapters": {name: to_tree(entries[name]) for name in sorted(entries)}}
    with whole(folder / INDEX) as draft:
        draft.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        sync(draft)


@contextmanager
def writing_to(folder: Path, *, patience: float = PATIENCE) -> Iterator[Library]:
    """Inside, this process alone changes the library, which is made where there is none. Waits for others so long.

    Yields what is there. Raises OutputError where another process still writes after `patience` seconds.
    """
    until = time.monotonic() + patience
    while True:
        lock = only_writer(folder)
        try:
            lock.__enter__()
            break
        except OutputError as error:
            if error.slug != "folder-in-use" or time.monotonic() >= until:
                raise
            time.sleep(0.05)
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / DRAFTS, ignore_errors=True)  # of a process that died: nobody else has the lock
            yield read_library(folder)
            shutil.rmtree(folder / DRAFTS, ignore_errors=True)
    finally:
        lock.__exit__(None, None, None)


def add(
    folder: str | Path,
    adapter: str | Path,
    *,
    name: str | None = None,
    description: str | None = None,
    licence: str | None = None,
    scores: Mapping[str, Score] | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
    several_bases: bool = False,
) -> tuple[str, list[str]]:
    """Copy an adapter into a library, which is made where there is none. Returns its name and remarks.

    `examples` are rows of its task, as training takes them, which `search` compares with. Scores and the digest of its
    rows that a run of ours left in the folder are taken over. Raises AdapterError for a damaged adapter, OutputError
    for a name that is taken, and BaseModelError for another base than that of the library, unless it is of several
    bases already or `several_bases` is said.
    """
    folder, source = Path(folder), Path(adapter)
    name = checked_name(source.resolve().name if name is None else name, set())
    check_numbers(Adapter.read(source).tensors, source / WEIGHTS)
    about = about_run(source)
    about = replace(
        about,
        description=description,
        licence=licence,
        scores=dict(about.scores) | dict(scores or {}),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    with writing_to(folder) as library:
        if (folder / name).exists():
            raise OutputError(
                f"{folder / name} exists: give another name (--name), or take that one out first (`graft library "
                f"remove {folder} {name}`)",
                code="already-exists",
            )
        remarks = _check_base(library, source, several_bases)
        draft = folder / DRAFTS / name
        _copy(source, draft)
        (draft / ABOUT).write_text(json.dumps(to_tree(about), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if examples:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples)
            (draft / EXAMPLES).write_text(text, encoding="utf-8")
        entry = entry_of(draft)
        for file in draft.iterdir():
            sync(file)
        draft.rename(folder / name)
        write_index(folder, {**library.entries, name: entry})
    same = [other for other, one in library.entries.items() if one.files.get(WEIGHTS) == entry.files[WEIGHTS]]
    return name, [*remarks, *(f"{other} has the same tensors, byte for byte" for other in same), *library.problems]


def about_run(folder: Path) -> About:
    """What a run of ours left beside its adapter: the digest of its rows, and figures on held-out rows."""
    rows = Checkpoints(folder / FOLDER, keep=0).last_facts().get("rows")
    scores: dict[str, Score] = {}
    try:
        held_out = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["held_out"]
        for key in ("loss_nats", "rouge_l"):
            if isinstance(value := held_out[key]["tuned"], int | float):
                scores[f"held_out_{key}"] = Score(value=float(value))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # another tool's folder, or another version's: nothing is known
    return About(data=f"sha256:{rows}" if isinstance(rows, str) else None, scores=scores)


def _check_base(library: Library, source: Path, several_bases: bool) -> list[str]:
    """Raise BaseModelError for an adapter of another base; a remark where nobody can know."""
    record = read_record(source)
    if record is None:
        return [f"{source} was written by another tool, without a fingerprint of its base: nobody checked the base"]
    here = Fingerprint(dict(record["base"]["tensors"]), dict(record["base"]["config"]))
    known: dict[str, str] = {}
    for name, entry in library.entries.items():
        if entry.base_fingerprint is not None:
            known.setdefault(entry.base_fingerprint, name)
    if here.digest in known or not known or len(known) > 1 or several_bases:
        return []
    (digest, name), *_ = known.items()
    theirs = (read_record(library.path(name)) or {}).get("base")
    if theirs is not None and not (what := difference(theirs, here)):
        return []  # the same weights; a newer transformers has other keys in its config
    raise BaseModelError(
        f"{source} was trained on {record['base']['name']!r} ({here.digest[:19]}), the adapters of {library.folder} on "
        f"{library.entries[name].base!r} ({digest[:19]}): {what if theirs is not None else 'another base'}. Add it to "
        "another library, or say --several-bases",
        code="other-base",
    )


def _copy(source: Path, draft: Path) -> None:
    """The files of an adapter, contents in the place of links."""
    draft.mkdir(parents=True)
    found = {path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}
    for path in found:
        shutil.copyfile(path, draft / path.name)
    if digests_of(draft) != {path.name: sha256_of(path) for path in found}:
        raise AdapterError(
            f"{source}: its files changed while they were copied. Add it again when nothing writes there",
            code="changing-files",
        )


def remove(folder: str | Path, names: Sequence[str], *, delete: bool = False) -> list[Path]:
    """Take adapters out of a library: into DIR/.removed, or for good. Returns where they are now.

    Raises AdapterError for a name that is none of the library's; nothing is then done.
    """
    folder, moved = Path(folder), []
    with writing_to(folder) as library:
        library.named(names)
        for name in dict.fromkeys(names):
            if not (folder / name).exists():
                continue  # it is in the index alone
            if delete:
                shutil.rmtree(folder / name)
                continue
            place = _free(folder / REMOVED / name)
            place.parent.mkdir(exist_ok=True)
            (folder / name).rename(place)
            moved.append(place)
        write_index(folder, {name: entry for name, entry in library.entries.items() if name not in names})
    return moved


def _free(path: Path) -> Path:
    """The path, or one with a number where that is taken."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


# Verifying --------------------------------------------------------------------------------------------------------


def verify(folder: str | Path) -> list[Finding]:
    """What is wrong: every file against its digest in the index, and the index against the folders.

    Raises AdapterError for a folder that is not there, and for an index that cannot be read or is missing.
    """
    folder = Path(folder)
    library = read_library(folder)
    if not (folder / INDEX).is_file():
        found = [Finding(INDEX, "is missing, so nothing can be checked by it: --repair makes it from the folders")]
        return [*found, *(Finding("", problem) for problem in library.problems[1:])]
    there = _adapters_in(folder)
    findings = [Finding(name, "is not in the index: --repair adds it") for name in there if name not in library.entries]
    for name, entry in library.entries.items():
        if name not in there:
            findings.append(Finding(name, f"its folder, or the {CONFIG} in it, is gone: --repair takes it out"))
        else:
            findings += [Finding(name, why) for why in _differences(there[name], entry)]
    return sorted(findings)


def _differences(folder: Path, entry: Entry) -> list[str]:
    now = digests_of(folder)
    found = [f"{file} is missing" for file in entry.files if file not in now]
    found += [
        f"{file} is not what was added" for file, digest in entry.files.items() if now.get(file, digest) != digest
    ]
    found += [f"{file} was not there when it was added" for file in now if file not in entry.files]
    if found:
        return found
    try:
        same = entry_of(folder) == entry
    except GraftError as error:
        return [str(error)]
    return [] if same else [f"{INDEX} says of it what does not follow from its files: remove {INDEX} and --repair"]


def repair(folder: str | Path) -> list[str]:
    """Make the index agree with the folders: adapters that it lacks come in, those whose folders are gone go out.

    An adapter whose files changed stays as the index has it. Returns what was done. Raises as `verify` does.
    """
    folder = Path(folder)
    read_library(folder)  # of a folder that is not there nothing is made
    with writing_to(folder) as library:
        missing = not (folder / INDEX).is_file()
        entries, there, done = dict(library.entries), _adapters_in(folder), []
        for name in [name for name in entries if name not in there]:
            del entries[name]
            done.append(f"{name} is gone and was taken out of the index")
        for name in [name for name in there if name not in entries]:
            try:
                entries[checked_name(name, set())] = entry_of(there[name])
                done.append(f"{name} was added to the index")
            except GraftError as error:
                done.append(f"{name} was left out: {error}")
        if missing:
            done.insert(0, f"{INDEX} was made from the folders")
        if done:
            write_index(folder, entries)
    return done
