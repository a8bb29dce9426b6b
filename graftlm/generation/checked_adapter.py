"""Folders of adapters that are checked once, and read again without the checks as long as no file of them changed."""

import copy
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.factors import Factors, LoraPlan, lora_plan
from graftlm.adapters.folder import (
    CONFIG,
    HEADS,
    RECORD,
    TEMPLATE,
    TOKENIZER,
    WEIGHTS,
    check_folder,
    read_json,
    sha256_of,
    sha256_of_bytes,
)
from graftlm.adapters.load import attach_tensors, check_base, members_of
from graftlm.adapters.tensors import check_rebuilt, sums_of_rebuilt
from graftlm.config.schema import to_tree
from graftlm.errors import AdapterError, GraftError, first_lines
from graftlm.hub.tokenizer import read_tokenizer
from graftlm.kernels.many_low_rank import by_columns
from graftlm.model.attach import detach
from graftlm.model.registry import attachment

FILES = (CONFIG, WEIGHTS, HEADS, RECORD, TEMPLATE, *TOKENIZER)
"""Patterns of what decides how an adapter answers."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A name that may stand in a URL and in the field `model` of a request."""

WAITS = (0.01, 0.1, 0.5, 0.0)
"""Seconds to wait after each attempt to read a folder that is being replaced. Between two renames its name may be gone
for as long as a busy machine keeps the program that renames from going on."""

SETTLED_NS = 50_000_000
"""A file that was written less than this before it was looked at may be written again under the same time stamp."""

Stamp = tuple[tuple[str, int, int, int, int, int], ...]
"""(name, size, mtime, ctime, device, inode) of each file."""


class Changed(Exception):
    """A file is another one than was checked."""


@dataclass(frozen=True, eq=False)
class CheckedAdapter:
    """An adapter whose folder was checked against its base, without its tensors."""

    folder: Path
    stamp: Stamp
    settled: bool
    """Whether any later change of a file is certain to change `stamp`."""
    fingerprint: str
    adapter: Adapter
    """Without tensors, and without what only training needs."""
    tokenizer: Any
    plan: LoraPlan | None

    @property
    def method(self) -> str:
        config = self.adapter.config
        return config.method if config is not None else self.adapter.layout.lower()

    def read(self) -> Adapter:
        """With its tensors, in memory of their own. Raises Changed where a file is not the one that was checked."""
        try:
            if not self.settled or stamp_of(self.folder) != self.stamp:
                raise Changed
            contents = (self.folder / WEIGHTS).read_bytes()  # not mapped: who shortens a mapped file kills its readers
            if stamp_of(self.folder) != self.stamp:
                raise Changed
        except (OSError, AdapterError):
            raise Changed from None
        return replace(self.adapter, tensors=load(contents))

    def factors(self, adapter: Adapter) -> Factors | None:
        """The factors of the adapter with its tensors, for `attach_factors`, in the dtype of the file; None where it is
        no plain LoRA."""
        if self.plan is None:
            return None
        tensors = adapter.tensors
        return {site: (tensors[A], by_columns(tensors[B], scale)) for site, (A, B, scale) in self.plan.items()}


class AdapterChecker:
    """Checks folders of adapters for a model, which it neither locks nor changes.

    Adapters are attached on trial to a second tree of the model's modules over the same tensors. What differs from one
    of ours that fitted in nothing but the numbers in its tensors fits, too.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._twin = _twin(model)
        self._forms: dict[str, LoraPlan | None] = {}
        self._tokenizers: dict[str | None, Any] = {}

    def check(self, folder: Path) -> tuple[CheckedAdapter, Adapter]:
        """Look for everything that can be wrong with an adapter. Returns it without and with its tensors, which are
        those of the mapped file. Raises AdapterError, BaseModelError or RecipeError."""
        for seconds in WAITS:
            now, before = time.time_ns(), None
            try:
                before = stamp_of(folder)
                adapter = Adapter.read(folder)
                found = self._check(folder, adapter)
                if stamp_of(folder) == before:
                    settled = now - max(at for one in before for at in one[2:4]) > SETTLED_NS
                    return replace(found, stamp=before, settled=settled), adapter
            except GraftError as error:
                if not _is_being_replaced(folder, before, error) or (before is None and not seconds):
                    raise
            except Exception as error:  # an adapter may hold anything, and whoever serves others goes on
                if not _is_being_replaced(folder, before, error):
                    raise AdapterError(
                        f"{folder}: cannot be read as an adapter: {type(error).__name__}: {first_lines(error)}. "
                        "Restore its files",
                        code="unusable-adapter",
                    ) from error
            time.sleep(seconds)
        raise AdapterError(
            f"{folder}: its files changed while they were read. Write the new adapter to another folder, then rename "
            "that folder",
            code="changing-files",
        )

    def _check(self, folder: Path, adapter: Adapter) -> CheckedAdapter:
        if adapter.config is not None:
            check_base(self._model, adapter)
        digests = _digests(folder)
        tokenizer = self._tokenizer(adapter, digests)
        with self._lock:
            plan = self._try(adapter)
        kept = Adapter(
            {}, adapter.peft_config, adapter.config, seed=adapter.seed, position=adapter.position,
            rebuilt=adapter.rebuilt, chat=adapter.chat, source=folder,
        )  # fmt: skip
        digest = "sha256:" + sha256_of_bytes(json.dumps(sorted(digests.items())).encode())
        return CheckedAdapter(folder, (), False, digest, kept, tokenizer, plan)

    def _tokenizer(self, adapter: Adapter, digests: Mapping[str, str]) -> Any:
        key = _joint(digests, (*TOKENIZER, TEMPLATE))
        with self._lock:
            if key not in self._tokenizers:
                self._tokenizers[key] = read_tokenizer(self._model, adapter.tokenizer_files, adapter.where)
            return self._tokenizers[key]

    def _try(self, adapter: Adapter) -> LoraPlan | None:
        """Attach to the twin and detach."""
        form = json.dumps(
            [
                None if adapter.config is None else to_tree(adapter.config),
                adapter.layout,
                adapter.seed,
                adapter.rebuilt,
                sorted((key, list(t.shape), str(t.dtype)) for key, t in adapter.tensors.items()),
            ],
            sort_keys=True,
            default=str,
        )
        form = sha256_of_bytes(form.encode())
        if form in self._forms:
            return self._forms[form]
        try:
            names, _ = attach_tensors(self._twin, adapter, "trial")
            plan = _plan(self._twin, adapter) if names == ["trial"] else None
            if adapter.config is not None:
                check_rebuilt(sums_of_rebuilt(self._twin, "trial"), adapter.rebuilt, adapter.where)
                self._forms[form] = plan
            detach(self._twin)
            return plan
        except GraftError:
            detach(self._twin)
            raise
        except Exception:
            self._twin = _twin(self._model)
            raise


def stamp_of(folder: Path) -> Stamp:
    """What tells that a file was changed. AdapterError for a link to elsewhere, and where there is no adapter."""
    check_folder(folder)
    inside, found = os.path.realpath(folder), []
    for file in _files(folder):
        if os.path.dirname(os.path.realpath(file)) != inside:
            raise AdapterError(
                f"{file}: is a link to a file outside of its folder, which may be anybody's. Put a copy of the file in "
                "its place (cp -rL copies a folder so)",
                code="link-out-of-folder",
            )
        s = file.stat()
        found.append((file.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino))
    return tuple(found)


def _is_being_replaced(folder: Path, before: Stamp | None, error: Exception) -> bool:
    """Whether an error may come of a folder that takes the place of another one just now, as a new version does."""
    if before is None:  # gone while its files were listed, or before that
        return isinstance(error, FileNotFoundError) or (
            isinstance(error, GraftError) and error.slug == "no-such-folder"
        )
    try:
        return stamp_of(folder) != before
    except (AdapterError, OSError):
        return True


def _files(folder: Path) -> list[Path]:
    names = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(names)


def _digests(folder: Path) -> dict[str, str]:
    """File -> SHA-256. What `Adapter.read` has just compared with the record is not summed again."""
    known = read_json(folder / RECORD)["sha256"] if (folder / RECORD).is_file() else {}
    return {file.name: known.get(file.name) or sha256_of(file) for file in _files(folder)}


def _joint(digests: Mapping[str, str], patterns: tuple[str, ...]) -> str | None:
    """One digest of the files that match; None where none does."""
    some = sorted((n, d) for n, d in digests.items() if any(Path(n).match(pattern) for pattern in patterns))
    return sha256_of_bytes(json.dumps(some).encode()) if some else None


def _twin(model: Any) -> Any:
    """A second tree of modules over the same tensors, without deltas; attaching freezes its own parameters."""
    same: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    same |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    twin = copy.deepcopy(model, same)
    return detach(twin) if attachment(twin).frozen else twin


def _plan(twin: Any, adapter: Adapter) -> LoraPlan | None:
    """Of an adapter that is on the twin, by its own tensors; None where it is no plain LoRA or they are converted."""
    members, _ = members_of(twin, adapter)
    plan = lora_plan(twin, members[0]) if len(members) == 1 else None
    if plan is None or not all(_same(adapter.tensors.get(key), own) for key, own in members[0].tensors.items()):
        return None
    return plan


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is other or (one is not None and torch.equal(one, other))


def checked_name(name: str, taken: set[str]) -> str:
    """The name; AdapterError for one that does not match NAME, and for one of the base."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise AdapterError(
            f"{name!r} cannot name an adapter: use letters, digits, '.', '-' and '_', 128 at most, beginning with a "
            "letter or digit",
            code="invalid-adapter-name",
        )
    if name in taken:
        raise AdapterError(f"{name!r} is the name of the base: choose another one", code="invalid-adapter-name")
    return name
