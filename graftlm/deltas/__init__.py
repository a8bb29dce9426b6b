"""METHODS: the table of every method. A new method is its file, its line here, and its comparison in the tests."""

from dataclasses import dataclass
from importlib.metadata import entry_points

from graftlm.deltas.base import AdditiveDelta, Delta, DeltaConfig, WeightDelta
from graftlm.deltas.bitfit import BitFit, BitFitConfig
from graftlm.deltas.dora import Dora, DoraConfig
from graftlm.deltas.full import Full, FullConfig
from graftlm.deltas.houlsby import Houlsby, HoulsbyConfig
from graftlm.deltas.ia3 import Ia3, Ia3Config
from graftlm.deltas.lora import Lora, LoraConfig
from graftlm.deltas.prefix import Prefix, PrefixConfig
from graftlm.deltas.prompt import Prompt, PromptConfig
from graftlm.deltas.reslora import ResLora, ResLoraConfig
from graftlm.deltas.vera import Vera, VeraConfig


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
    "bitfit": Method(BitFitConfig, BitFit),
    "dora": Method(DoraConfig, Dora),
    "full": Method(FullConfig, Full),
    "houlsby": Method(HoulsbyConfig, Houlsby),
    "ia3": Method(Ia3Config, Ia3),
    "lora": Method(LoraConfig, Lora),
    "prefix": Method(PrefixConfig, Prefix),
    "prompt": Method(PromptConfig, Prompt),
    "reslora": Method(ResLoraConfig, ResLora),
    "vera": Method(VeraConfig, Vera),
}

for _entry in entry_points(group="graftlm.methods"):  # methods of other packages: name = "module:METHOD"
    METHODS.setdefault(_entry.name, _entry.load())
