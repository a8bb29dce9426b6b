"""What an adapter pool knows and keeps: records by name, adapters on the model, tensors beside it."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from graftlm.adapters.adapter import Adapter, ChatRecord
from graftlm.generation.checked_adapter import CheckedAdapter


@dataclass(frozen=True)
class Registered:
    """What is known of an adapter by name, whether it is in memory or not."""

    name: str
    method: str
    """Of ours; of another tool's adapter its `peft_type` in small letters."""
    fingerprint: str
    """`sha256:` and the digest of the adapter's files: another one wherever a file of it is."""
    folder: Path
    parent: str
    """The public name of the base."""
    chat: ChatRecord
    pinned: bool
    """Whether it stays on the model from its registration on."""


class PoolCounts(NamedTuple):
    """For metrics. The first three only grow."""

    hits: int
    """Times that an adapter was on the model when it was acquired."""
    loads: int
    """Times that one was put on the model."""
    evictions: int
    """Times that one was taken off to make place for another."""
    resident: int
    """Adapters that are on the model and may be acquired without a load."""
    registered: int
    host_bytes: int
    """Bytes of the tensors that are kept in memory beside the model."""
    leased: int
    """Adapters that a lease holds, those that were unregistered included."""


@dataclass(frozen=True, eq=False)
class Entry:
    registered: Registered
    checked: CheckedAdapter


@dataclass(eq=False)
class Resident:
    """An adapter on the model."""

    entry: Entry
    delta: str
    """Its name on the model."""
    leases: int = 0
    partial: int = 0
    """Leases of those who wait for another adapter beside it: they do not end before that is there."""
    used: int = 0


class HostCache:
    """Adapters with their tensors, those that were used last, in bounded memory."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[str, tuple[str, Adapter]] = OrderedDict()

    def get(self, name: str, fingerprint: str) -> Adapter | None:
        found = self._kept.get(name)
        if found is None or found[0] != fingerprint:
            return None
        self._kept.move_to_end(name)
        return found[1]

    def keep(self, name: str, fingerprint: str, adapter: Adapter) -> None:
        self.drop(name)
        size = _bytes(adapter)
        if size > self.limit:
            return
        while self.bytes + size > self.limit:
            self.drop(next(iter(self._kept)))
        self._kept[name] = fingerprint, adapter
        self.bytes += size

    def drop(self, name: str) -> None:
        if (gone := self._kept.pop(name, None)) is not None:
            self.bytes -= _bytes(gone[1])


def _bytes(adapter: Adapter) -> int:
    return sum(tensor.nbytes for tensor in adapter.tensors.values())


def same_files(one: Entry, other: Entry) -> bool:
    here, there = one.registered, other.registered
    return here.fingerprint == there.fingerprint and here.folder == there.folder
