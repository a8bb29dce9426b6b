"""An adapter of another tool while it is read: how names and places of its model are those of ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from graftlm.adapters.folder import CONFIG
from graftlm.adapters.foreign.config import read_where
from graftlm.adapters.foreign.keys import Renaming, renamed
from graftlm.deltas import Method
from graftlm.deltas.base import DeltaConfig, PeftLayout, Targets
from graftlm.errors import TargetError
from graftlm.model.bases import LinearBase, view
from graftlm.model.hosts import LayerHost
from graftlm.model.sites import Place, find_sites, output_head, places


@dataclass(frozen=True)
class Member:
    """A delta of ours that an adapter of another tool is, or one of several."""

    name: str
    """What follows the adapter's name in that of the delta; empty for the method itself."""
    config: DeltaConfig
    layout: PeftLayout | None
    tensors: dict[str, Tensor]
    """By the keys of that layout; None is our own (`graftlm/adapters/tensors.py`)."""


class ConvertedAdapter(NamedTuple):
    """What was read: the deltas in the order in which they act, and remarks on how it was read."""

    members: list[Member]
    remarks: list[str]


class Reading:
    """One adapter while it is read: the model, the config, and what is to be said."""

    def __init__(
        self, model: Any, config_json: dict[str, Any], method_name: str, method: Method, layout: PeftLayout, file: Path
    ) -> None:
        self.model, self.config_json, self.file = model, config_json, file
        self.method_name, self.method, self.layout = method_name, method, layout
        self.config_file = file.with_name(CONFIG)
        self.where = read_where(config_json, self.config_file)
        self.lora = layout.type == "LORA"
        self.places = places(model)
        self.modules = {name for name, _ in model.named_modules()}
        self.ends = _ends(model, self.places)
        self.by: Renaming = []
        self.remarks: list[str] = []
        self.problems: list[str] = []

    def here(self, name: str) -> str:
        """The name in this model of what the file calls `name`."""
        return name if name in self.modules else renamed(name, self.by)

    def there(self, name: str) -> str:
        """What the file calls a module of this model."""
        there = renamed(name, [(new, old) for old, new in self.by])
        return there if self.here(there) == name else name

    def was_there(self, name: str) -> bool:
        """Whether the model that was trained can have had a module: not, where only a part of this model is like it."""
        return not self.by or name in self.ends or self.there(name) != name

    def kind(self, module: str) -> str | None:
        return self.places[module].kind if module in self.places else None

    def view(self, module: str) -> LinearBase | None:
        return view(self.places[module].module) if module in self.places else None

    def tied(self) -> bool:
        one, other = (self.places[end].module for end in self.ends)
        return one.weight is other.weight

    def targets(self, sites: list[str], kinds: Sequence[str], preferred: Targets | None = None) -> Targets:
        """Targets that mean these sites: the given ones, or the sites' names."""
        for targets in (preferred, tuple(sites)):
            try:
                if targets and find_sites(self.model, targets, kinds) == sites:
                    return targets
            except TargetError:
                continue
        return "|".join(re.escape(site) for site in sites)


def _ends(model: Any, places: Mapping[str, Place]) -> list[str]:
    """The names of the input embeddings and the output head, where there are such."""
    getter = getattr(model, "get_input_embeddings", None)
    embeddings = getter() if getter else None
    embeddings = embeddings.base if isinstance(embeddings, LayerHost) else embeddings
    ends = [embeddings, output_head(model)]
    return [name for end in ends for name, place in places.items() if place.module is end]
