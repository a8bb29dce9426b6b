"""The tensors of a file by what they are, under the names of this model."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftlm.adapters.foreign.keys import TOKENS, WRAPPERS, Key, parse_key, renamed, renamings
from graftlm.adapters.foreign.reading import Reading
from graftlm.adapters.tensors import PREFIX
from graftlm.errors import AdapterError


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of a file, with the names that its module has in the file and in this model."""

    file_key: str
    there: str
    here: str
    rest: str
    tensor: Tensor

    @property
    def plain(self) -> str:
        """Its key as PEFT would write it for this model."""
        return f"{PREFIX}{self.here}.{self.rest}" if self.here else self.rest


@dataclass
class Contents:
    """The tensors of a file by what they are."""

    main: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the method itself, by plain key; and those of no kind, to be refused with the nearest names."""
    sites: dict[str, str] = field(default_factory=dict)
    """The sites of the method: module name in this model -> module name in the file."""
    weights: dict[tuple[str, str], NamedTensor] = field(default_factory=dict)
    """(module, weight or bias) -> what stands in place of the base's."""
    copies: dict[tuple[str, str], NamedTensor] = field(default_factory=dict)
    """(module, weight or bias) -> what should be equal to the base's."""
    rows: dict[str, NamedTensor] = field(default_factory=dict)
    """Module -> the rows of its tokens."""
    shifts: dict[str, NamedTensor] = field(default_factory=dict)
    """Module -> the bias of lora_B."""


def named_tensors(reading: Reading, tensors: Mapping[str, Tensor]) -> list[NamedTensor]:
    """Every tensor with its names; those of the file are mapped onto this model's where they are others."""
    keys: dict[str, Key] = {}
    for key in (parse_key(file_key, reading.layout) for file_key in tensors):
        other = keys.get(key.plain)
        if other is not None and not torch.equal(tensors[other.file_key], tensors[key.file_key]):
            raise AdapterError(
                f"{reading.file}: {other.file_key} and {key.file_key} are one tensor with two values",
                code="contradicting-tensors",
            )
        keys[key.plain] = key
    adapters = sorted({key.adapter for key in keys.values() if key.adapter})
    if len(adapters) > 1:
        names = f"{len(adapters)} adapters ({', '.join(adapters)}): save each into a folder of its own"
        raise AdapterError(f"{reading.file}: holds the tensors of {names}", code="several-adapters")
    whole = {plain: tensors[key.file_key] for plain, key in keys.items()}
    if reading.layout.read is not None:
        whole = reading.layout.read(reading.config_json, whole)
    unknown = {key.module for key in keys.values()} - reading.modules
    fits = [(sum(renamed(name, by) in reading.modules for name in unknown), by) for by in renamings(reading.model)]
    most = max(count for count, _ in fits)
    reading.by = next(by for count, by in fits if count == most) if most else []
    _remark_on_names(reading, keys.values(), adapters)
    found = [(keys[plain], tensor) for plain, tensor in whole.items()]
    return [NamedTensor(key.file_key, key.module, reading.here(key.module), key.rest, tensor) for key, tensor in found]


def _remark_on_names(reading: Reading, keys: Collection[Key], adapters: Sequence[str]) -> None:
    changes = [f"without {part}" for part in WRAPPERS if any(part in key.file_key.split(".") for key in keys)]
    changes += [f"without the adapter's name {name!r}" for name in adapters]
    if not any(PREFIX in key.file_key for key in keys):
        changes.append(f"with {PREFIX} before them")
    changes += [f"{new or '(nothing)'} for {old or '(nothing)'}" for old, new in reading.by]
    if changes:
        reading.remarks.append(f"the names of its tensors were mapped onto this model's: {', '.join(changes)}")


def check_experts(reading: Reading, tensors: Sequence[NamedTensor]) -> None:
    """Raise AdapterError for a tensor of one expert where the model has all experts of a layer in one parameter."""
    fused = [name for name in reading.modules if name.endswith(".experts") and f"{name}.0" not in reading.modules]
    for one in tensors:
        if fused and re.search(r"\.experts\.\d+\.", one.here) and one.here not in reading.modules:
            raise AdapterError(
                f"{reading.file}: {one.file_key} is about one expert, and this model has all of a layer in one "
                f"parameter ({fused[0]}), as transformers 5 loads it. No delta here can sit there: merge the "
                "adapter in PEFT (merge_and_unload), which converts it, and use the merged model as the base",
                code="fused-experts",
            )


def sort_tensors(reading: Reading, tensors: Iterable[NamedTensor]) -> Contents:
    """Each tensor under what it is: of the method, in place of the base's, a copy, rows of tokens, a bias."""
    contents = Contents()
    own = {*reading.layout.tensors.values(), *reading.layout.embedding.values()}
    for one in tensors:
        place = (one.here, one.rest.removeprefix("base_layer."))
        bias = place[1] == "bias" and reading.where.bias in ("all", "lora_only")
        trained = bias or (place[1] == one.rest and _saved(reading, one))
        if not one.here or one.rest in own:
            contents.main[one.plain] = one.tensor
            if reading.kind(one.here) in reading.method.delta.kinds:
                contents.sites[one.here] = one.there
        elif one.rest == TOKENS and reading.lora:
            contents.rows[one.here] = one
        elif one.rest == "lora_B.bias" and reading.where.lora_bias:
            contents.shifts[one.here] = one
        elif one.here in reading.modules and trained:
            contents.weights[place] = one
        elif one.here in reading.modules and (one.rest.startswith("base_layer.") or one.here in reading.ends):
            contents.copies[place] = one
        else:
            contents.main[one.plain] = one.tensor
    return contents


def _saved(reading: Reading, one: NamedTensor) -> bool:
    """Whether all weights of a module were trained. PEFT names embedding or head, and may tie the other one to it."""
    tied = bool(reading.config_json.get("ensure_weight_tying")) and one.here in reading.ends
    saves = reading.where.saves
    return any(saves(reading.there(end)) for end in reading.ends) if tied else saves(one.there)
