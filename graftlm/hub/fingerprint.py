"""The fingerprint that says which base a model has, and the name and folder that it was loaded from."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from graftlm.errors import BaseModelError
from graftlm.files import cache_folder
from graftlm.hub.locate import PACKAGED, PACKAGED_FROM
from graftlm.model.quantize import QuantizedLinear
from graftlm.model.state_dict import base_parameters


class BaseRecord(NamedTuple):
    """What `load_base` leaves on a model: the name it was asked for, and the folder it came from."""

    name: str
    folder: str | None


def base_record(model: nn.Module) -> BaseRecord:
    """The record of a base, or one made from what transformers knows of a model that was loaded otherwise."""
    record = getattr(model, "graft_base", None)
    if isinstance(record, BaseRecord):
        return record
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return BaseRecord(name or type(model).__name__, name if name and Path(name).is_dir() else None)


def public_name(model: nn.Module) -> str:
    """The name of a base for what may be published: a hub id, or the name of its folder without those around it."""
    name = base_record(model).name
    if name in PACKAGED:
        return PACKAGED_FROM[name]
    path = Path(name).expanduser()
    if cached := [part for part in path.parts if part.startswith("models--")]:  # in the hub's cache
        return cached[0].removeprefix("models--").replace("--", "/", 1)
    return path.resolve().name if path.is_absolute() or path.exists() or name.startswith(".") else name


VOLATILE = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "use_cache", "auto_map"}
"""Keys of a model's config that do not change what it computes."""


class Fingerprint(NamedTuple):
    """Which base this is: a digest of each weight, and the config that says how they are used."""

    tensors: dict[str, str]
    config: dict[str, Any]

    @property
    def digest(self) -> str:
        text = json.dumps([self.tensors, self.config], sort_keys=True, default=str)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What `difference` compares."""
        return {"digest": self.digest, "config": self.config, "tensors": self.tensors}


def difference(saved: Mapping[str, Any], here: Fingerprint) -> str:
    """What makes a base another one than the `to_json` of its fingerprint says; empty where nothing does.

    Keys that only one of the configs has do not count: a newer transformers adds keys of its own.
    """
    tensors, config = saved["tensors"], saved["config"]
    wrong = sorted(k for k in tensors.keys() | here.tensors.keys() if tensors.get(k) != here.tensors.get(k))
    if wrong:
        return f"{len(wrong)} of {len(here.tensors)} weights differ, the first is {wrong[0]}"
    changed = sorted(k for k in config.keys() & here.config.keys() if config[k] != here.config[k])
    if changed:
        differences = ", ".join(f"{k} is {here.config[k]!r}, not {config[k]!r}" for k in changed)
        return f"the weights are the same, but {differences}"
    return ""


def fingerprint(model: Any) -> Fingerprint:
    """The fingerprint of a model's base, deltas left out; cached by the folder that it came from.

    Weights are hashed as bf16, so that a base is the same base whether it is loaded in bf16 or in fp32.
    """
    known = getattr(model, "graft_fingerprint", None)
    if isinstance(known, Fingerprint):
        return known
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise BaseModelError(
            "this base is quantized, and its weights before that were not recorded: quantize() it",
            code="unknown-original-weights",
        )
    settings = json.loads(json.dumps(model.config.to_dict(), default=str)) if hasattr(model, "config") else {}
    settings = {k: v for k, v in settings.items() if k not in VOLATILE and not k.startswith("_")}
    cached = _fingerprint_file(base_record(model).folder, next(model.parameters()).dtype)
    tensors: dict[str, str] | None = None
    if cached is not None and cached.is_file():
        try:
            tensors = json.loads(cached.read_text())
        except ValueError:
            cached.unlink()  # a cache that is damaged is made again
    if tensors is None:
        tensors = {name: digest_of(p) for name, p in base_parameters(model).items()}
        if cached is not None:
            _write_quietly(cached, json.dumps(tensors))
    new_fingerprint = Fingerprint(tensors, settings)
    model.graft_fingerprint = new_fingerprint
    return new_fingerprint


def digest_of(tensor: torch.Tensor) -> str:
    """The digest of a tensor's shape and of its values in bf16."""
    canonical = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    shape = ",".join(map(str, canonical.shape)).encode()
    return hashlib.sha256(shape + b":" + canonical.view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def _fingerprint_file(folder: str | None, dtype: torch.dtype) -> Path | None:
    if folder is None:
        return None
    files = sorted(Path(folder).glob("*.safetensors"))
    stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([str(Path(folder).resolve()), stamp, str(dtype)]).encode()).hexdigest()[:24]
    return _fingerprint_folder() / f"{key}.json"


def _fingerprint_folder() -> Path:
    return cache_folder() / "fingerprints"


def _write_quietly(path: Path, text: str) -> None:
    """A cache that cannot be written costs time later and is no reason to stop now."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        pass
