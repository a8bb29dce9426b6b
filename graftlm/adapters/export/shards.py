"""Safetensors files written piece by piece: what is in memory is one piece, not one file.

A safetensors file begins with the shapes and places of all its tensors, which are not known before the last one. So
pieces are files of their own, and become one by copying on the disk.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 * 2**30
"""The most bytes of weights in a file, unless one piece has more."""
BLOCK = 2**24
"""Bytes that are copied at a time."""

WEIGHTS = "model.safetensors"


class Shards:
    """The weights of a model in `folder`, named as transformers names them: one file, or several with an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pieces: list[Path] = []
        self._bytes = 0  # of the pieces that are in no shard yet
        self._shards: list[list[str]] = []  # the names in each
        self._total = 0

    def add(self, piece: Mapping[str, Tensor]) -> None:
        """Write some tensors; they may then be forgotten."""
        size = sum(tensor.nbytes for tensor in piece.values())
        if self._pieces and self._bytes + size > SHARD_BYTES:
            self._join()
        if piece:
            self._pieces.append(self.folder / f"piece-{len(self._pieces)}")
            save_file(dict(piece), self._pieces[-1])
            self._bytes, self._total = self._bytes + size, self._total + size

    def close(self) -> None:
        """Complete the files, and write the index where there are several."""
        self._join()
        count = len(self._shards)
        files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [WEIGHTS]
        for number, file in enumerate(files):
            (self.folder / f"shard-{number}").rename(self.folder / file)
        if count > 1:
            where = {name: file for file, names in zip(files, self._shards, strict=True) for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": where}
            (self.folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _join(self) -> None:
        self._shards.append(join(self._pieces, self.folder / f"shard-{len(self._shards)}"))
        for piece in self._pieces:
            piece.unlink()
        self._pieces, self._bytes = [], 0


class StoredTensor(NamedTuple):
    """The place of a tensor's bytes, and its entry in the header of its file."""

    name: str
    about: dict[str, Any]
    file: Path
    start: int
    length: int


def join(pieces: list[Path], out: Path) -> list[str]:
    """One safetensors file of several; returns the names of its tensors."""
    tensors = [tensor for piece in pieces for tensor in stored_tensors_of(piece)]
    tensors.sort(key=lambda t: -_item_bytes(t))  # each then begins at a multiple of its items' size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = tensor.about | {"data_offsets": [at, at + tensor.length]}
        at += tensor.length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(out, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            with open(tensor.file, "rb") as source:
                source.seek(tensor.start)
                _copy(source, file, tensor.length)
    return [tensor.name for tensor in tensors]


def stored_tensors_of(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in the order of their bytes."""
    with open(file, "rb") as source:
        size = int.from_bytes(source.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(source.read(size))
    found = []
    for name, about in header.items():
        if name != "__metadata__":
            first, last = about.pop("data_offsets")
            found.append(StoredTensor(name, about, file, 8 + size + first, last - first))
    return sorted(found, key=lambda tensor: tensor.start)


def _item_bytes(tensor: StoredTensor) -> int:
    count = 1
    for size in tensor.about["shape"]:
        count *= size
    return tensor.length // max(count, 1)


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    while length:
        block = source.read(min(length, BLOCK))
        target.write(block)
        length -= len(block)
