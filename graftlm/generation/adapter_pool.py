"""Many adapters over one model: registered by name, on the model while requests use them, the rest on disk.

    pool = AdapterPool(model, slots=16)
    pool.register("sql", "runs/sql")
    with pool.acquire("sql") as lease:              # waits until the adapter is on the model
        engine.wait(engine.submit(Request(ids, 64, adapters=lease.adapters)))

An adapter lives in three places. Its folder is checked when it is registered, and nothing of it is kept but its record.
Its tensors are read when a request needs them, and stay in memory within `host_bytes`. It is on the model, in one of
`slots`, as long as a lease holds it or nobody else needs the slot; the slot that was not used for longest is given
first (the tiers of S-LoRA, Sheng et al. 2023, arXiv:2311.03285).
"""

import dataclasses
import itertools
import json
import math
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.factors import Factors, factors_of
from graftlm.adapters.folder import sha256_of_bytes
from graftlm.adapters.load import attach_tensors
from graftlm.errors import AdapterError, nearest
from graftlm.generation.checked_adapter import AdapterChecker, Changed, CheckedAdapter, checked_name, stamp_of
from graftlm.generation.engine import model_lock
from graftlm.generation.pool_parts import Entry, HostCache, PoolCounts, Registered, Resident, same_files
from graftlm.hub.fingerprint import base_record, public_name
from graftlm.hub.tokenizer import embedding_rows, with_more_tokens
from graftlm.model.attach import detach
from graftlm.model.factors import attach_factors, detach_factors
from graftlm.model.modes import activate, active_row
from graftlm.model.registry import Chat, attachment
from graftlm.model.routes import Row

_NUMBERS = itertools.count(1)
"""Of loads: no two deltas of this process have the same name."""


class Lease:
    """Adapters that stay on the model until `release`. A context manager that releases at its end."""

    def __init__(self, pool: "AdapterPool", held: Sequence[tuple[Resident, float]]) -> None:
        self._pool, self._held = pool, [resident for resident, _ in held]
        self.adapters: Row = {resident.delta: weight for resident, weight in held}
        """The value for `Request.adapters`; empty for the base."""
        self.registered = tuple(resident.entry.registered for resident in self._held)
        """The adapters in the order in which they act."""
        prints = [(resident.entry.registered.fingerprint, weight) for resident, weight in held]
        several = "sha256:" + sha256_of_bytes(json.dumps(prints).encode()) if prints else ""
        self.fingerprint = prints[0][0] if len(prints) == 1 and prints[0][1] == 1 else several
        """That of the only adapter; of several or with another weight than 1, a digest of fingerprints and weights;
        empty for the base. What depends on an answer of a model may be kept under it."""
        known = [chat for resident in self._held if (chat := resident.entry.checked.adapter.chat.settings) is not None]
        self.chat: Chat | None = known[-1] if known else None
        """How conversations were rendered in training, for the last adapter that says so; None: as for the base."""
        self.tokenizer = pool._tokenizer([resident.entry for resident in self._held])
        """The tokenizer of the adapters; None: that of the base."""

    def release(self) -> None:
        """Allow that the adapters leave the model. Again and again is once. Never waits for a pass."""
        held, self._held = self._held, []
        self._pool._release(held)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class AdapterPool:
    """The adapters of one model. All methods may be called from any thread."""

    def __init__(
        self, model: Any, *, slots: int = 16, host_bytes: int = 2**29, dtype: torch.dtype | None = None
    ) -> None:
        """`slots` adapters are on the model at most; `host_bytes` of others' tensors stay in memory (0: none).

        `dtype` is what plain LoRA factors are held in on the model: float32, bfloat16, or None for that of the files.
        """
        if slots < 1 or host_bytes < 0:
            raise ValueError("a pool has one slot at least, and no negative memory")
        self.model, self.slots, self.host_bytes, self.dtype = model, slots, host_bytes, dtype
        self.parent = public_name(model)
        self._bases = {self.parent, base_record(model).name}
        with model_lock(model):
            self._checker = AdapterChecker(model)
        self._turn = threading.Condition()
        self._several = threading.Lock()
        """Held while adapters are acquired of which one is waited for while others are held: two such would wait for
        each other."""
        self._entries: dict[str, Entry] = {}
        self._residents: dict[str, Resident] = {}
        self._leaving: list[Resident] = []
        """On the model, and no new lease may have it: its name means another adapter or none, or it gives its slot."""
        self._loading: set[str] = set()
        self._claimed = 0
        """Slots of adapters that are being loaded."""
        self._line: deque[object] = deque()
        """Threads that wait for a slot, in order of arrival."""
        self._host = HostCache(host_bytes)
        self._uses = itertools.count(1)
        self._hits = self._loads = self._evictions = 0

    # What is registered ----------------------------------------------------------------------------------------------

    def register(self, name: str, folder: str | Path, *, pinned: bool = False, replace: bool = False) -> Registered:
        """Check an adapter and make it known by `name`. Reads its files once and keeps no tensor.

        With `replace` the name may be taken: requests that hold the earlier adapter end with it, new ones get this one;
        of the same files nothing changes but `pinned`. `pinned`: put it on the model now, for good.
        Raises AdapterError for a name that no request could give or that is taken, for a folder that is damaged, has
        links to files outside of it, or does not fit the base; BaseModelError for another base. The pool is then as it
        was.
        """
        checked_name(name, self._bases)
        with self._turn:
            self._check_room(name, pinned, replace)
        checked, _ = self._checker.check(Path(folder).absolute())
        entry = Entry(self._registered(name, checked, pinned), checked)
        with self._turn:
            self._check_room(name, pinned, replace)
            before = self._entries.get(name)
            self._enter(name, entry)
        if pinned:
            try:
                self.acquire(name).release()
            except BaseException:
                with self._turn:
                    if self._entries.get(name) is entry:
                        self._enter(name, before)
                raise
        return entry.registered

    def unregister(self, name: str) -> Registered:
        """Forget an adapter; requests that hold it end with it. AdapterError for a name that is not registered."""
        with self._turn:
            entry = self._entry(name)
            self._enter(name, None)
        return entry.registered

    def registered(self) -> list[Registered]:
        """All adapters, in the order in which their names were registered."""
        with self._turn:
            return [entry.registered for entry in self._entries.values()]

    def get(self, name: str) -> Registered:
        """The record of an adapter. AdapterError (`adapter/not-registered`) for a name that is not registered."""
        with self._turn:
            return self._entry(name).registered

    def factors(self, name: str) -> Factors | None:
        """The factors of an adapter, read now, for what computes with them beside requests; None where it has none.

        Raises AdapterError for a name that is not registered, and for files that are damaged since.
        """
        with self._turn:
            entry = self._entry(name)
        entry, adapter = self._read(entry)
        found = entry.checked.factors(adapter)
        return factors_of(self.model, adapter, trust_base=True) if found is None else found

    def tokenizer(self, names: Sequence[str]) -> Any:
        """The tokenizer that has the tokens of all these adapters; None: that of the base. AdapterError: none has."""
        with self._turn:
            entries = [self._entry(name) for name in names]
        return self._tokenizer(entries)

    def counts(self) -> PoolCounts:
        """The counters."""
        with self._turn:
            resident, registered = len(self._residents), len(self._entries)
            leased = sum(one.leases > 0 for one in [*self._residents.values(), *self._leaving])
            return PoolCounts(self._hits, self._loads, self._evictions, resident, registered, self._host.bytes, leased)

    def _registered(self, name: str, checked: CheckedAdapter, pinned: bool) -> Registered:
        return Registered(
            name, checked.method, checked.fingerprint, checked.folder, self.parent, checked.adapter.chat, pinned
        )

    def _check_room(self, name: str, pinned: bool, replace: bool) -> None:
        if name in self._entries and not replace:
            raise AdapterError(
                f"an adapter {name!r} is registered already: choose another name, or say that it replaces that one",
                code="name-registered",
            )
        others = sum(entry.registered.pinned for other, entry in self._entries.items() if other != name)
        if pinned and others + 1 >= self.slots:
            raise AdapterError(
                f"{name!r} cannot be pinned: {others} of {self.slots} slots are, and one must be left for the others. "
                "Give the pool more slots",
                code="no-slot-to-pin",
            )

    def _enter(self, name: str, entry: Entry | None) -> None:
        """Let a name mean another adapter, or none."""
        before, resident = self._entries.get(name), self._residents.get(name)
        if entry is None:
            self._entries.pop(name, None)
        else:
            self._entries[name] = entry
        same = entry is not None and before is not None and same_files(entry, before)
        if resident is not None and entry is not None and same:
            resident.entry = entry
        elif resident is not None:
            self._leaving.append(self._residents.pop(name))
        if not same:
            self._host.drop(name)
        self._turn.notify_all()

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise AdapterError(
                f"no adapter {name!r} is registered. {nearest(str(name), self._entries)}", code="not-registered"
            )
        return self._entries[name]

    def _tokenizer(self, entries: Sequence[Entry]) -> Any:
        """The one that has all tokens; AdapterError where none has."""
        rows = embedding_rows(self.model)
        known = [(entry.checked.tokenizer, entry.registered.name) for entry in entries if entry.checked.tokenizer]
        first = (known[0][0] if known else None), ""
        return reduce(lambda one, other: (with_more_tokens(one[0], other[0], rows, other[1]), ""), known, first)[0]

    # What is on the model --------------------------------------------------------------------------------------------

    def acquire(self, names: str | Mapping[str, float], *, timeout: float | None = None) -> Lease:
        """Wait until an adapter, or each of several with its weight, is on the model, and keep it there.

        `names`: one name, or names and weights in the order in which they act; {} is the base and never waits. Files
        that changed since they were checked are checked again before they are read, and the record is renewed.
        Raises AdapterError for a name that is not registered (`adapter/not-registered`), where all slots are in use for
        longer than `timeout` seconds (`adapter/no-free-slot`), and what `register` raises for files that were changed.
        """
        wanted = {names: 1.0} if isinstance(names, str) else dict(names)
        if bad := [weight for weight in wanted.values() if not math.isfinite(weight)]:
            raise ValueError(f"the weight of an adapter is a finite number, not {bad[0]}")
        deadline = None if timeout is None else time.monotonic() + timeout
        several, held = len(wanted) > 1, list[tuple[Resident, float]]()
        if several:
            self._check_fits(wanted)
            if not self._several.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
                raise self._no_slot(", ".join(wanted))
        try:
            for name, weight in wanted.items():
                held.append((self._hold(name, deadline, several), weight))
            return Lease(self, held)
        except BaseException:
            self._release([resident for resident, _ in held])
            raise
        finally:
            if several:
                with self._turn:
                    for resident, _ in held:
                        resident.partial -= 1
                self._several.release()

    def _check_fits(self, wanted: Mapping[str, float]) -> None:
        with self._turn:
            pinned = sum(e.registered.pinned for name, e in self._entries.items() if name not in wanted)
        if len(wanted) > self.slots - pinned:
            raise AdapterError(
                f"{len(wanted)} adapters cannot be on the model at once: the pool has {self.slots} slots, and {pinned} "
                "of them are pinned. Ask for fewer, or give the pool more slots",
                code="too-many-adapters",
            )

    def _release(self, held: Sequence[Resident]) -> None:
        with self._turn:
            for resident in held:
                resident.leases -= 1
            self._turn.notify_all()

    def _hold(self, name: str, deadline: float | None, partial: bool) -> Resident:
        """The adapter on the model, with one more lease; loaded by one of the threads that want it."""
        with self._turn:
            while True:
                entry = self._entry(name)
                if (resident := self._residents.get(name)) is not None:
                    self._hits += 1
                    return self._leased(resident, partial)
                if name not in self._loading:
                    self._loading.add(name)
                    break
                self._wait(name, deadline)
        try:
            return self._load(entry, deadline, partial)
        finally:
            with self._turn:
                self._loading.remove(name)
                self._turn.notify_all()

    def _leased(self, resident: Resident, partial: bool) -> Resident:
        resident.leases += 1
        resident.partial += partial
        resident.used = next(self._uses)
        return resident

    def _load(self, entry: Entry, deadline: float | None, partial: bool) -> Resident:
        name = entry.registered.name
        out = self._claim(name, deadline)  # before the tensors are read: who waits holds none
        try:
            entry, adapter = self._read(entry)
            short = entry.registered.fingerprint.removeprefix("sha256:")[:12]
            factors = entry.checked.factors(adapter)
            delta = f"{re.sub('[^A-Za-z0-9]', '_', name)[:40]}-{short}-{next(_NUMBERS)}"
            with model_lock(self.model):
                if out is not None:
                    leaving, out = out, None
                    self._take_off(leaving.delta)
                if factors is not None:
                    attach_factors(self.model, delta, factors, dtype=self.dtype)
                else:
                    self._put_on(adapter, delta)
        except BaseException:
            with self._turn:
                self._claimed -= 1
                if out is not None:
                    self._leaving.append(out)
            raise
        with self._turn:
            self._claimed -= 1
            self._loads += 1
            resident = self._leased(Resident(entry, delta), partial)
            now = self._entries.get(name)
            if now is not None and same_files(now, entry):
                resident.entry = now
                self._residents[name] = resident
            else:  # replaced in the meantime
                self._leaving.append(resident)
        return resident

    def _claim(self, name: str, deadline: float | None) -> Resident | None:
        """Wait for a slot in order of arrival; the adapter that has to leave it, if any."""
        ticket = object()
        with self._turn:
            self._line.append(ticket)
            try:
                while self._line[0] is not ticket or not self._free_slot():
                    self._wait(name, deadline)
                self._claimed += 1
                return self._out()
            finally:
                self._line.remove(ticket)
                self._turn.notify_all()

    def _free_slot(self) -> bool:
        """Whether a slot is free, or holds an adapter without a lease. If every adapter is leased, the least recently
        used one gets no new leases: requests for it wait in line too, so a few busy adapters starve no other."""
        if len(self._residents) + len(self._leaving) + self._claimed < self.slots:
            return True
        may_go = [one for one in self._residents.values() if not one.entry.registered.pinned]
        if any(not one.leases for one in [*self._leaving, *may_go]):
            return True
        may_go = [one for one in may_go if not one.partial]
        if not self._leaving and may_go:
            least = min(may_go, key=lambda one: one.used)
            self._leaving.append(self._residents.pop(least.entry.registered.name))
        return False

    def _out(self) -> Resident | None:
        if len(self._residents) + len(self._leaving) + self._claimed <= self.slots:
            return None
        if gone := next((one for one in self._leaving if not one.leases), None):
            self._leaving.remove(gone)
        else:
            free = [one for one in self._residents.values() if not one.leases and not one.entry.registered.pinned]
            gone = min(free, key=lambda one: one.used)
            del self._residents[gone.entry.registered.name]
        self._evictions += 1
        return gone

    def _wait(self, name: str, deadline: float | None) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise self._no_slot(name)
        self._turn.wait(left)

    def _no_slot(self, name: str) -> AdapterError:
        return AdapterError(
            f"{name}: no slot became free in time: requests hold all {self.slots} adapters that may be on the model. "
            "Ask again later, or give the pool more slots",
            code="no-free-slot",
        )

    def _read(self, entry: Entry) -> tuple[Entry, Adapter]:
        """The adapter with its tensors; with another entry where its files changed and were checked again."""
        name, checked = entry.registered.name, entry.checked
        try:
            with self._turn:
                kept = self._host.get(name, checked.fingerprint)
            if kept is not None and checked.settled and stamp_of(checked.folder) == checked.stamp:
                return entry, kept
            adapter = checked.read()
        except (Changed, AdapterError):
            checked, adapter = self._checker.check(checked.folder)
            adapter = dataclasses.replace(
                adapter, tensors={key: tensor.clone() for key, tensor in adapter.tensors.items()}
            )
            new = Entry(self._registered(name, checked, entry.registered.pinned), checked)
            with self._turn:
                if self._entries.get(name) is entry:
                    self._enter(name, new)
            entry = new
        with self._turn:
            if self._entries.get(name) is entry:
                self._host.keep(name, checked.fingerprint, adapter)
        return entry, adapter

    def _take_off(self, delta: str) -> None:
        if delta in attachment(self.model).factors:
            detach_factors(self.model, delta)  # its hosts stay for the next one
        else:
            detach(self.model, delta)

    def _put_on(self, adapter: Adapter, delta: str) -> None:
        """Attach, and leave what is active as it is. The caller holds the model's lock."""
        before = tuple(active_row(self.model))
        try:
            attach_tensors(self.model, adapter, delta)
        except BaseException:
            for name in [name for name in attachment(self.model).configs if name.startswith(delta)]:
                detach(self.model, name)
            raise
        activate(self.model, *before)
