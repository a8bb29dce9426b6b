"""METHODS: the table of every method. A new method is its file, its line here, and its comparison in the tests.

Other distributions add rows to it (`graftlm/plugins.py`).
"""

from dataclasses import dataclass

from graftlm.deltas.adalora import AdaLora, AdaLoraConfig
from graftlm.deltas.base import AdditiveDelta, Delta, DeltaConfig, WeightDelta
from graftlm.deltas.beft import Beft, BeftConfig
from graftlm.deltas.bitfit import BitFit, BitFitConfig
from graftlm.deltas.block_lora import BlockLora, BlockLoraConfig
from graftlm.deltas.boft import Boft, BoftConfig
from graftlm.deltas.bone import Bone, BoneConfig
from graftlm.deltas.c3a import C3a, C3aConfig
from graftlm.deltas.delora import Delora, DeloraConfig
from graftlm.deltas.diff_pruning import DiffPruning, DiffPruningConfig
from graftlm.deltas.dora import Dora, DoraConfig
from graftlm.deltas.dvora import Dvora, DvoraConfig
from graftlm.deltas.dylora import DyLora, DyLoraConfig
from graftlm.deltas.eigenlorax import EigenLorax, EigenLoraxConfig
from graftlm.deltas.flora import Flora, FloraConfig
from graftlm.deltas.fourierft import FourierFT, FourierFTConfig
from graftlm.deltas.full import Full, FullConfig
from graftlm.deltas.gated_lora import GatedLora, GatedLoraConfig
from graftlm.deltas.glora import Glora, GloraConfig
from graftlm.deltas.gralora import Gralora, GraloraConfig
from graftlm.deltas.hira import Hira, HiraConfig
from graftlm.deltas.houlsby import Houlsby, HoulsbyConfig
from graftlm.deltas.hra import Hra, HraConfig
from graftlm.deltas.ia3 import Ia3, Ia3Config
from graftlm.deltas.intrinsic import Intrinsic, IntrinsicConfig
from graftlm.deltas.kasa import Kasa, KasaConfig
from graftlm.deltas.lamda import Lamda, LamdaConfig
from graftlm.deltas.last_layers import LastLayers, LastLayersConfig
from graftlm.deltas.lily import Lily, LilyConfig
from graftlm.deltas.lin_adapter import LinAdapter, LinAdapterConfig
from graftlm.deltas.loha import Loha, LohaConfig
from graftlm.deltas.lokr import Lokr, LokrConfig
from graftlm.deltas.loldu import Loldu, LolduConfig
from graftlm.deltas.lora import Lora, LoraConfig
from graftlm.deltas.lora_mini import LoraMini, LoraMiniConfig
from graftlm.deltas.lora_xs import LoraXs, LoraXsConfig
from graftlm.deltas.melora import MeLora, MeLoraConfig
from graftlm.deltas.mora import Mora, MoraConfig
from graftlm.deltas.moslora import MosLora, MosLoraConfig
from graftlm.deltas.multilora import MultiLora, MultiLoraConfig
from graftlm.deltas.nlora import Nlora, NloraConfig
from graftlm.deltas.nola import Nola, NolaConfig
from graftlm.deltas.nora import Nora, NoraConfig
from graftlm.deltas.norm_tuning import NormTuning, NormTuningConfig
from graftlm.deltas.oft import Oft, OftConfig
from graftlm.deltas.parallel import Parallel, ParallelConfig
from graftlm.deltas.pmss import Pmss, PmssConfig
from graftlm.deltas.prefix import Prefix, PrefixConfig
from graftlm.deltas.prompt import Prompt, PromptConfig
from graftlm.deltas.qa_lora import QaLora, QaLoraConfig
from graftlm.deltas.randlora import RandLora, RandLoraConfig
from graftlm.deltas.reft import Reft, ReftConfig
from graftlm.deltas.reslora import ResLora, ResLoraConfig
from graftlm.deltas.road import Road, RoadConfig
from graftlm.deltas.s2ft import S2ft, S2ftConfig
from graftlm.deltas.shira import Shira, ShiraConfig
from graftlm.deltas.smt import Smt, SmtConfig
from graftlm.deltas.spiel import Spiel, SpielConfig
from graftlm.deltas.tied_lora import TiedLora, TiedLoraConfig
from graftlm.deltas.trainable_tokens import TrainableTokens, TrainableTokensConfig
from graftlm.deltas.vb_lora import VbLora, VbLoraConfig
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
    "adalora": Method(AdaLoraConfig, AdaLora),
    "beft": Method(BeftConfig, Beft),
    "bitfit": Method(BitFitConfig, BitFit),
    "block-lora": Method(BlockLoraConfig, BlockLora),
    "boft": Method(BoftConfig, Boft),
    "bone": Method(BoneConfig, Bone),
    "c3a": Method(C3aConfig, C3a),
    "delora": Method(DeloraConfig, Delora),
    "diff-pruning": Method(DiffPruningConfig, DiffPruning),
    "dora": Method(DoraConfig, Dora),
    "dvora": Method(DvoraConfig, Dvora),
    "dylora": Method(DyLoraConfig, DyLora),
    "eigenlorax": Method(EigenLoraxConfig, EigenLorax),
    "flora": Method(FloraConfig, Flora),
    "fourierft": Method(FourierFTConfig, FourierFT),
    "full": Method(FullConfig, Full),
    "gated-lora": Method(GatedLoraConfig, GatedLora),
    "glora": Method(GloraConfig, Glora),
    "gralora": Method(GraloraConfig, Gralora),
    "hira": Method(HiraConfig, Hira),
    "houlsby": Method(HoulsbyConfig, Houlsby),
    "hra": Method(HraConfig, Hra),
    "ia3": Method(Ia3Config, Ia3),
    "intrinsic": Method(IntrinsicConfig, Intrinsic),
    "kasa": Method(KasaConfig, Kasa),
    "lamda": Method(LamdaConfig, Lamda),
    "last-layers": Method(LastLayersConfig, LastLayers),
    "lily": Method(LilyConfig, Lily),
    "lin-adapter": Method(LinAdapterConfig, LinAdapter),
    "loha": Method(LohaConfig, Loha),
    "lokr": Method(LokrConfig, Lokr),
    "loldu": Method(LolduConfig, Loldu),
    "lora": Method(LoraConfig, Lora),
    "lora-mini": Method(LoraMiniConfig, LoraMini),
    "lora-xs": Method(LoraXsConfig, LoraXs),
    "melora": Method(MeLoraConfig, MeLora),
    "mora": Method(MoraConfig, Mora),
    "moslora": Method(MosLoraConfig, MosLora),
    "multilora": Method(MultiLoraConfig, MultiLora),
    "nlora": Method(NloraConfig, Nlora),
    "nola": Method(NolaConfig, Nola),
    "nora": Method(NoraConfig, Nora),
    "norm-tuning": Method(NormTuningConfig, NormTuning),
    "oft": Method(OftConfig, Oft),
    "parallel": Method(ParallelConfig, Parallel),
    "pmss": Method(PmssConfig, Pmss),
    "prefix": Method(PrefixConfig, Prefix),
    "prompt": Method(PromptConfig, Prompt),
    "qa-lora": Method(QaLoraConfig, QaLora),
    "randlora": Method(RandLoraConfig, RandLora),
    "reft": Method(ReftConfig, Reft),
    "reslora": Method(ResLoraConfig, ResLora),
    "road": Method(RoadConfig, Road),
    "s2ft": Method(S2ftConfig, S2ft),
    "shira": Method(ShiraConfig, Shira),
    "smt": Method(SmtConfig, Smt),
    "spiel": Method(SpielConfig, Spiel),
    "tied-lora": Method(TiedLoraConfig, TiedLora),
    "trainable-tokens": Method(TrainableTokensConfig, TrainableTokens),
    "vb-lora": Method(VbLoraConfig, VbLora),
    "vera": Method(VeraConfig, Vera),
}
