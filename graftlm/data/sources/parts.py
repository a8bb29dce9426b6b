"""The files that a source stands for: one file, those of a pattern, or what another trainer describes."""

import hashlib
from dataclasses import replace
from itertools import chain
from pathlib import Path

from graftlm.data.sources import axolotl, llama_factory
from graftlm.data.sources.other_trainers import Part
from graftlm.data.sources.records import expanded, files


def parts_of(path: str) -> list[Part]:
    """Every file that the path of a source names, with the format that its description gives it."""
    return [replace(part, path=one) for part in _described(path) for one in expanded(part.path)]


def _described(path: str) -> list[Part]:
    """The file itself, or the files that `dataset_info.json:NAME` or an Axolotl .yaml describes."""
    file, colon, name = path.rpartition(":")
    if colon and file.endswith(".json"):
        return [llama_factory.part(Path(file).expanduser(), name)]
    if path.endswith((".yaml", ".yml")):
        return axolotl.parts(Path(path).expanduser())
    return [Part(path)]


def content_hash(path: str) -> str | None:
    """The SHA-256 (64 hexadecimal digits) of all files of a source and of what describes them; None for a source that
    has no files on this machine."""
    described = path.rpartition(":")[0] if path.rpartition(":")[0].endswith(".json") else path
    digest = hashlib.sha256()
    names = dict.fromkeys(part.path for part in parts_of(path))
    if described != path or path.endswith((".yaml", ".yml")):
        names = dict.fromkeys([described, *names])
    for file in chain.from_iterable(map(files, names)):
        if not file.is_file():
            return None
        digest.update(f"{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            while some := stream.read(2**20):
                digest.update(some)
    return digest.hexdigest()
