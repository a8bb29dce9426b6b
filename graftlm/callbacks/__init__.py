"""POLICIES: the table of what acts between steps. A new policy is its file, its line here, and its test."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graftlm.callbacks.adalora import AdaLoraPolicy, AdaLoraPolicyConfig
from graftlm.callbacks.allora import Allora, AlloraConfig
from graftlm.callbacks.alora import Alora, AloraConfig
from graftlm.callbacks.autolora import AutoLora, AutoLoraConfig
from graftlm.callbacks.bilora import BiLora, BiLoraConfig
from graftlm.callbacks.cola import Cola, ColaConfig
from graftlm.callbacks.diff_pruning import DiffPruningPolicy, DiffPruningPolicyConfig
from graftlm.callbacks.diffora import DiffoRA, DiffoRAConfig
from graftlm.callbacks.dylora import DyLoraPolicy, DyLoraPolicyConfig
from graftlm.callbacks.ema import Ema, EmaConfig
from graftlm.callbacks.i_lora import ILora, ILoraConfig
from graftlm.callbacks.increlora import IncreLora, IncreLoraConfig
from graftlm.callbacks.lamda import LamdaPolicy, LamdaPolicyConfig
from graftlm.callbacks.lisa import Lisa, LisaConfig
from graftlm.callbacks.lora_fa import LoraFa, LoraFaConfig
from graftlm.callbacks.lora_plus import LoraPlus, LoraPlusConfig
from graftlm.callbacks.lora_sp import LoraSp, LoraSpConfig
from graftlm.callbacks.lte import Lte, LteConfig
from graftlm.callbacks.neftune import Neftune, NeftuneConfig
from graftlm.callbacks.periodic_lora import PeriodicLora, PeriodicLoraConfig
from graftlm.callbacks.riemannian import Riemannian, RiemannianConfig
from graftlm.callbacks.sora import Sora, SoraConfig
from graftlm.callbacks.spiel import SpielPolicy, SpielPolicyConfig
from graftlm.callbacks.velora import Velora, VeloraConfig
from graftlm.errors import TrainingError
from graftlm.optim.adalomo import AdaLomo, AdaLomoConfig
from graftlm.optim.adamw_8bit import AdamW8bit, AdamW8bitConfig
from graftlm.optim.coap import Coap, CoapConfig
from graftlm.optim.flora_compression import FloraCompression, FloraCompressionConfig
from graftlm.optim.galore import Galore, GaloreConfig
from graftlm.optim.lomo import Lomo, LomoConfig
from graftlm.optim.schedule_free import ScheduleFree, ScheduleFreeConfig
from graftlm.optim.sm3 import Sm3, Sm3Config
from graftlm.training.adamw import adamw
from graftlm.training.callback import ParameterGroup, Policy, PolicyConfig, Training


@dataclass(frozen=True)
class Row:
    """A row of the table: the config that names the policy, and what it makes."""

    config: type[PolicyConfig]
    policy: type[Policy]


POLICIES: dict[str, Row] = {
    "adalomo": Row(AdaLomoConfig, AdaLomo),
    "adalora": Row(AdaLoraPolicyConfig, AdaLoraPolicy),
    "adamw-8bit": Row(AdamW8bitConfig, AdamW8bit),
    "allora": Row(AlloraConfig, Allora),
    "alora": Row(AloraConfig, Alora),
    "autolora": Row(AutoLoraConfig, AutoLora),
    "bilora": Row(BiLoraConfig, BiLora),
    "coap": Row(CoapConfig, Coap),
    "cola": Row(ColaConfig, Cola),
    "diff-pruning": Row(DiffPruningPolicyConfig, DiffPruningPolicy),
    "diffora": Row(DiffoRAConfig, DiffoRA),
    "dylora": Row(DyLoraPolicyConfig, DyLoraPolicy),
    "ema": Row(EmaConfig, Ema),
    "flora-compression": Row(FloraCompressionConfig, FloraCompression),
    "galore": Row(GaloreConfig, Galore),
    "i-lora": Row(ILoraConfig, ILora),
    "increlora": Row(IncreLoraConfig, IncreLora),
    "lamda": Row(LamdaPolicyConfig, LamdaPolicy),
    "lisa": Row(LisaConfig, Lisa),
    "lomo": Row(LomoConfig, Lomo),
    "lora-fa": Row(LoraFaConfig, LoraFa),
    "lora-plus": Row(LoraPlusConfig, LoraPlus),
    "lora-sp": Row(LoraSpConfig, LoraSp),
    "lte": Row(LteConfig, Lte),
    "neftune": Row(NeftuneConfig, Neftune),
    "periodic-lora": Row(PeriodicLoraConfig, PeriodicLora),
    "riemannian": Row(RiemannianConfig, Riemannian),
    "schedule-free": Row(ScheduleFreeConfig, ScheduleFree),
    "sm3": Row(Sm3Config, Sm3),
    "sora": Row(SoraConfig, Sora),
    "spiel": Row(SpielPolicyConfig, SpielPolicy),
    "velora": Row(VeloraConfig, Velora),
}


COMPLETES: dict[str, tuple[str, ...]] = {
    "adalora": ("adalora", "bilora", "increlora"),
    "diff-pruning": ("diff-pruning",),
    "dylora": ("dylora",),
    "lamda": ("lamda",),
    "spiel": ("spiel",),
}
"""Method -> the policies of which it needs one to be what its paper describes. A recipe without any gets the first."""


def make_policies(configs: Sequence[PolicyConfig]) -> list[Policy]:
    return [POLICIES[config.name].policy(config) for config in configs]


def default_rate(policies: Sequence[Policy], rate: float) -> float:
    """The learning rate of a method under these policies, where the recipe gives none."""
    for policy in policies:
        rate = policy.default_rate(rate)
    return rate


def make_optimiser(
    policies: Sequence[Policy], groups: Sequence[ParameterGroup], *, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser that a policy brings, or AdamW; raises TrainingError where two bring one."""
    for policy in policies:
        groups = policy.groups(groups)
    made = {p.config.name: own for p in policies if (own := p.optimiser(groups, weight_decay=weight_decay)) is not None}
    if len(made) > 1:
        raise TrainingError(f"policies: {' and '.join(made)} each bring an optimiser: a run has one")
    if made:
        return next(iter(made.values()))
    return adamw([(group.parameters.values(), group.rate) for group in groups], weight_decay=weight_decay)


def check_policies(policies: Sequence[Policy], training: Training) -> None:
    """Raise TrainingError for a policy that has no meaning for what is trained, with its reason."""
    for policy in policies:
        if reason := policy.refuse(training):
            methods = ", ".join(dict.fromkeys(config.method for config in training.deltas.values()))
            raise TrainingError(f"policies: {policy.config.name} with {methods}: {reason}")
        if reason := policy.beside([other for other in policies if other is not policy]):
            raise TrainingError(f"policies: {policy.config.name} beside {reason}")
        looks = type(policy).on_grads is not Policy.on_grads
        if looks and (fused := [other.config.name for other in policies if other.fused and other is not policy]):
            raise TrainingError(
                f"policies: {policy.config.name} acts on the gradient of a step, of which {fused[0]} leaves nothing"
            )
