"""CALLBACKS: the table of what acts between steps. A new callback is its file, its line here, and its test."""

from graftlm.callbacks.adalora import AdaLoraCallback, AdaLoraCallbackConfig
from graftlm.callbacks.allora import Allora, AlloraConfig
from graftlm.callbacks.alora import Alora, AloraConfig
from graftlm.callbacks.autolora import AutoLora, AutoLoraConfig
from graftlm.callbacks.bilora import BiLora, BiLoraConfig
from graftlm.callbacks.cola import Cola, ColaConfig
from graftlm.callbacks.diff_pruning import DiffPruningCallback, DiffPruningCallbackConfig
from graftlm.callbacks.diffora import DiffoRA, DiffoRAConfig
from graftlm.callbacks.dylora import DyLoraCallback, DyLoraCallbackConfig
from graftlm.callbacks.ema import Ema, EmaConfig
from graftlm.callbacks.i_lora import ILora, ILoraConfig
from graftlm.callbacks.increlora import IncreLora, IncreLoraConfig
from graftlm.callbacks.lamda import LamdaCallback, LamdaCallbackConfig
from graftlm.callbacks.lisa import Lisa, LisaConfig
from graftlm.callbacks.lora_fa import LoraFa, LoraFaConfig
from graftlm.callbacks.lora_plus import LoraPlus, LoraPlusConfig
from graftlm.callbacks.lora_sp import LoraSp, LoraSpConfig
from graftlm.callbacks.lte import Lte, LteConfig
from graftlm.callbacks.neftune import Neftune, NeftuneConfig
from graftlm.callbacks.periodic_lora import PeriodicLora, PeriodicLoraConfig
from graftlm.callbacks.riemannian import Riemannian, RiemannianConfig
from graftlm.callbacks.sora import Sora, SoraConfig
from graftlm.callbacks.spiel import SpielCallback, SpielCallbackConfig
from graftlm.callbacks.velora import Velora, VeloraConfig
from graftlm.training.callback import CallbackRow as Row

CALLBACKS: dict[str, Row] = {
    "adalora": Row(AdaLoraCallbackConfig, AdaLoraCallback),
    "allora": Row(AlloraConfig, Allora),
    "alora": Row(AloraConfig, Alora),
    "autolora": Row(AutoLoraConfig, AutoLora),
    "bilora": Row(BiLoraConfig, BiLora),
    "cola": Row(ColaConfig, Cola),
    "diff-pruning": Row(DiffPruningCallbackConfig, DiffPruningCallback),
    "diffora": Row(DiffoRAConfig, DiffoRA),
    "dylora": Row(DyLoraCallbackConfig, DyLoraCallback),
    "ema": Row(EmaConfig, Ema),
    "i-lora": Row(ILoraConfig, ILora),
    "increlora": Row(IncreLoraConfig, IncreLora),
    "lamda": Row(LamdaCallbackConfig, LamdaCallback),
    "lisa": Row(LisaConfig, Lisa),
    "lora-fa": Row(LoraFaConfig, LoraFa),
    "lora-plus": Row(LoraPlusConfig, LoraPlus),
    "lora-sp": Row(LoraSpConfig, LoraSp),
    "lte": Row(LteConfig, Lte),
    "neftune": Row(NeftuneConfig, Neftune),
    "periodic-lora": Row(PeriodicLoraConfig, PeriodicLora),
    "riemannian": Row(RiemannianConfig, Riemannian),
    "sora": Row(SoraConfig, Sora),
    "spiel": Row(SpielCallbackConfig, SpielCallback),
    "velora": Row(VeloraConfig, Velora),
}
