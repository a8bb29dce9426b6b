"""METHODS: the table of every method. A new method is its file, its line here, and its comparison in the tests."""

from dataclasses import dataclass
from importlib.metadata import entry_points

from graftlm.deltas.base import AdditiveDelta, Delta, DeltaConfig, WeightDelta
from graftlm.deltas.lora import Lora, LoraConfig


@dataclass(frozen=True)
class Method:
    """A row of the table: the config that names the method and the delta that it makes. The rest is read off them."""

    config: type[DeltaConfig]
    delta: type[Delta]

    @property
    def mergeable(self) -> bool:
        return issubclass(self.delta, WeightDelta)

    @property
    def has_factors(self) -> bool:
        return issubclass(self.delta, AdditiveDelta) and self.delta.factors is not AdditiveDelta.factors


METHODS: dict[str, Method] = {
    "lora": Method(LoraConfig, Lora),
}

for _entry in entry_points(group="graftlm.methods"):  # methods of other packages: name = "module:METHOD"
    METHODS.setdefault(_entry.name, _entry.load())
