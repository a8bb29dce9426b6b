"""COMPOSERS: the table of every rule of composition. A new rule is its file, its line here, and its test."""

from dataclasses import dataclass

from graftlm.combine.rules.base import Rule, RuleConfig
from graftlm.combine.rules.breadcrumbs import Breadcrumbs, BreadcrumbsConfig
from graftlm.combine.rules.cat import Cat, CatConfig
from graftlm.combine.rules.dare import Dare, DareConfig
from graftlm.combine.rules.della import Della, DellaConfig
from graftlm.combine.rules.iso_c import IsoC, IsoCConfig
from graftlm.combine.rules.karcher import Karcher, KarcherConfig
from graftlm.combine.rules.lego import Lego, LegoConfig
from graftlm.combine.rules.linear import Linear, LinearConfig
from graftlm.combine.rules.lorahub import Lorahub, LorahubConfig
from graftlm.combine.rules.magnitude import Magnitude, MagnitudeConfig
from graftlm.combine.rules.model_stock import ModelStock, ModelStockConfig
from graftlm.combine.rules.negation import Negation, NegationConfig
from graftlm.combine.rules.peft_linear import PeftLinear, PeftLinearConfig
from graftlm.combine.rules.regmean import RegMean, RegMeanConfig
from graftlm.combine.rules.sce import Sce, SceConfig
from graftlm.combine.rules.slerp import Slerp, SlerpConfig
from graftlm.combine.rules.svd import Svd, SvdConfig
from graftlm.combine.rules.ties import Ties, TiesConfig
from graftlm.combine.rules.tsv import Tsv, TsvConfig
from graftlm.combine.rules.wudi import Wudi, WudiConfig
from graftlm.combine.rules.ziplora import Ziplora, ZiploraConfig


@dataclass(frozen=True)
class Composer:
    """A row of the table: the config that names the rule, and the rule that it makes."""

    config: type[RuleConfig]
    rule: type[Rule]


COMPOSERS: dict[str, Composer] = {
    "breadcrumbs": Composer(BreadcrumbsConfig, Breadcrumbs),
    "cat": Composer(CatConfig, Cat),
    "dare": Composer(DareConfig, Dare),
    "della": Composer(DellaConfig, Della),
    "iso-c": Composer(IsoCConfig, IsoC),
    "karcher": Composer(KarcherConfig, Karcher),
    "lego": Composer(LegoConfig, Lego),
    "linear": Composer(LinearConfig, Linear),
    "lorahub": Composer(LorahubConfig, Lorahub),
    "magnitude": Composer(MagnitudeConfig, Magnitude),
    "model-stock": Composer(ModelStockConfig, ModelStock),
    "negation": Composer(NegationConfig, Negation),
    "peft-linear": Composer(PeftLinearConfig, PeftLinear),
    "regmean": Composer(RegMeanConfig, RegMean),
    "sce": Composer(SceConfig, Sce),
    "slerp": Composer(SlerpConfig, Slerp),
    "svd": Composer(SvdConfig, Svd),
    "ties": Composer(TiesConfig, Ties),
    "tsv": Composer(TsvConfig, Tsv),
    "wudi": Composer(WudiConfig, Wudi),
    "ziplora": Composer(ZiploraConfig, Ziplora),
}
