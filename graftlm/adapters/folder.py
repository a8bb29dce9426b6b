"""The folder of an adapter: its files, their checksums, and how a new one takes its place whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftlm.errors import AdapterError, OutputError, nearest
from graftlm.files import sync, writing

CONFIG, WEIGHTS, HEADS = "adapter_config.json", "adapter_model.safetensors", "heads.safetensors"
RECORD, TEMPLATE = "graftlm.json", "chat_template.jinja"
RECIPE, SUMMARY = "recipe.yaml", "summary.json"
TOKENIZER = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken")
"""Patterns of the files that transformers saves a tokenizer as, beside the chat template."""


@contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False, keep: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well, and is removed when it does not.

    Raises OutputError if `out` exists (with `overwrite`: if it is anything but an adapter or an empty folder), cannot
    be written, or the disk is full. What was there before stays until the new folder is complete; what lies there
    under the names in `keep` moves into the new one.
    """
    out = Path(out)
    check_new_folder(out, overwrite=overwrite, keep=keep)
    partial = _beside(out, "partial")
    try:
        with writing(out):
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed and had the same number
            partial.mkdir(parents=True)
            yield partial
            _swap(partial, out, keep)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(out: Path, *, overwrite: bool = False, keep: Sequence[str] = ()) -> None:
    """Raise OutputError where `new_folder` would, before there is anything to write."""
    if out.exists() and not overwrite:
        raise OutputError(
            f"{out} exists and would be lost: choose another folder, or say --overwrite", code="already-exists"
        )
    ours = any((path / CONFIG).is_file() for path in (out, *adapters_in(out).values()))
    if out.exists() and not ours and not (out.is_dir() and all(path.name in keep for path in out.iterdir())):
        raise OutputError(
            f"{out} is no adapter folder, so even --overwrite does not replace it: choose another folder",
            code="not-an-adapter-folder",
        )


def mend_folder(out: Path, *, keep: Sequence[str] = ()) -> None:
    """Put right what a process left that was killed while it exchanged `out` for a new folder, and clear its drafts.

    The caller has the lock of `out` (`graftlm.lock`): on a shared file system nobody can tell from a process id in a
    name whether that process lives.
    """
    for other in sorted(out.absolute().parent.glob(f".{out.name}.*-*")):
        kind, _, process = other.name.removeprefix(f".{out.name}.").rpartition("-")
        if kind not in ("partial", "old") or not process.isdecimal():
            continue
        if kind == "old" and not out.exists():
            other.rename(out)
            continue
        if kind == "old":
            _carry_over(other, out, keep)
        shutil.rmtree(other) if other.is_dir() else other.unlink()


def _beside(out: Path, kind: str) -> Path:
    return Path(os.path.abspath(out)).with_name(f".{out.name}.{kind}-{os.getpid()}")


def _swap(partial: Path, out: Path, keep: Sequence[str]) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            sync(file)
    if out.exists():
        old = _beside(out, "old")
        out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            old.rename(out)
            raise
        _carry_over(old, out, keep)
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    else:
        partial.rename(out)


def _carry_over(old: Path, out: Path, keep: Sequence[str]) -> None:
    for name in keep:
        if (old / name).exists() and not (out / name).exists():
            (old / name).rename(out / name)


def adapters_in(folder: Path) -> dict[str, Path]:
    """The adapter that a folder is, as `default`; or those that lie in it, as a run with several deltas leaves them."""
    if (folder / CONFIG).is_file():
        return {"default": folder}
    found = [file.parent for file in sorted(folder.glob(f"*/{CONFIG}"))]
    order = {path: (read_record(path) or {}).get("position", 0) for path in found}  # in which they act
    inside = {path.name: path for path in sorted(found, key=lambda path: order[path])}
    return inside or {"default": folder}


def named_adapters(folder: Path) -> dict[str, Path]:
    """The adapters in a folder by the names of their folders; an adapter's own folder is one."""
    return {path.resolve().name: path for path in adapters_in(folder).values()}


def check_folder(folder: Path) -> None:
    if not folder.is_dir():
        near = [str(p) for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise AdapterError(f"{folder}: no such adapter folder. {nearest(str(folder), near)}", code="no-such-folder")
    if not (folder / CONFIG).is_file():
        inside = [p.parent.name for p in folder.glob(f"*/{CONFIG}")]
        hint = f" There are adapters in its folders {inside}" if inside else ""
        raise AdapterError(f"{folder}: no {CONFIG}, so this is no adapter.{hint}", code="no-adapter-config")
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise AdapterError(
                f"{folder}: its weights are pickled (adapter_model.bin), which may run code: save them as safetensors "
                "with PEFT",
                code="pickled-weights",
            )
        raise AdapterError(f"{folder}: no {WEIGHTS}", code="no-weights")


_BEFORE: dict[str, Any] = {
    "chat_template": None, "layout": "LORA", "position": 0, "rebuilt": {}, "seed": 0, "today": None, "turn_order": None,
}  # fmt: skip
"""Keys that version 0.1.0 did not write."""


def read_record(folder: Path) -> dict[str, Any] | None:
    if not (folder / RECORD).is_file():
        return None
    ours = read_json(folder / RECORD)
    whole = {"base": ("name", "digest", "config", "tensors"), "config": (), "sha256": (CONFIG, WEIGHTS)}
    for part, keys in whole.items():
        if not isinstance(ours.get(part), dict) or not ours[part].keys() >= set(keys):
            raise AdapterError(
                f"{folder / RECORD}: {part!r} is incomplete, so nothing can be checked by it. Restore the file, or "
                "delete it to load the folder as an adapter of another tool",
                code="incomplete-record",
            )
    sums = ours["sha256"]
    if (folder / HEADS).is_file() and HEADS not in sums:
        raise AdapterError(
            f"{folder / HEADS}: {RECORD} has no checksum of it, so it is not of this adapter. Remove it",
            code="checksum-mismatch",
        )
    if RECORD in sums and sums[RECORD] != sha256_of_record(ours):
        raise AdapterError(
            f"{folder / RECORD}: its checksum of itself is not the one that was written. The file is damaged or was "
            "edited; restore it, or delete it to load the folder as an adapter of another tool",
            code="checksum-mismatch",
        )
    ours = {**_BEFORE, **ours}
    for file, expected in sums.items():
        if file == RECORD:
            continue
        if file == HEADS and not (folder / file).is_file():
            raise AdapterError(f"{folder}: no {HEADS}, which {RECORD} has a checksum of. Restore it", code="no-weights")
        if file not in (CONFIG, WEIGHTS, HEADS) or sha256_of(folder / file) != expected:
            raise AdapterError(
                f"{folder / file}: its checksum is not the one that was written. The file is damaged or was edited; "
                f"restore it, or delete {RECORD} to load it as an adapter of another tool",
                code="checksum-mismatch",
            )
    return ours


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a folder by name, without the chat template."""
    found = {path.name: path for pattern in TOKENIZER for path in folder.glob(pattern) if path.is_file()}
    return {name: found[name].read_bytes() for name in sorted(found)}


def read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: cannot be read: {error}", code="unreadable-file") from None
    if not isinstance(tree, dict):
        raise AdapterError(f"{file}: must hold a mapping, this holds a {type(tree).__name__}", code="not-a-mapping")
    return tree


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a complete safetensors file: {error}", code="damaged-weights") from None
    return tensors


def sha256_of(file: Path, length: int | None = None) -> str:
    """The SHA-256 of a file, or of its first bytes, in hexadecimal digits; empty if it is shorter than that."""
    digest = hashlib.sha256()
    bytes_left = file.stat().st_size if length is None else length
    with open(file, "rb") as handle:
        while bytes_left and (block := handle.read(min(bytes_left, 2**20))):
            digest.update(block)
            bytes_left -= len(block)
    return "" if bytes_left else digest.hexdigest()


def sha256_of_record(record: Mapping[str, Any]) -> str:
    """The SHA-256 of the content of graftlm.json, without this digest itself."""
    sums = {file: digest for file, digest in record["sha256"].items() if file != RECORD}
    return sha256_of_bytes(json.dumps({**record, "sha256": sums}, sort_keys=True).encode())


def sha256_of_bytes(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def sha256_of_text(text: Any) -> str | None:
    return None if text is None else sha256_of_bytes(str(text).encode())
