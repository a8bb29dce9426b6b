"""What PEFT can express, and how it reads a folder: its config, what its `target_modules` mean, what it loses."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from graftlm.adapters.tensors import modules_of
from graftlm.deltas import METHODS
from graftlm.deltas.base import Delta, DeltaConfig, PeftLayout, matches
from graftlm.model.hosts import Host, LayerHost, ModelHost
from graftlm.model.registry import attachment, hosts
from graftlm.model.sites import config_at

OWN_TYPE = "GRAFTLM"
"""The `peft_type` of a delta that PEFT has no word for: PEFT refuses it, and so does not load it half."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "corda_config": (None,),
    "ensure_weight_tying": (False,),
    "eva_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "loftq_config": (None, {}),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
"""Keys of PEFT's LORA that change what an adapter computes, with the values at which they do not; others: refused."""

NEUTRAL_ANYWHERE: dict[str, tuple[Any, ...]] = {
    "exclude_modules": (None, []),
    "layers_pattern": (None, [], ""),
    "layers_to_transform": (None, []),
    "modules_to_save": (None, []),
}
"""The same for the keys that most types have."""

MOE_AS_QWEN2 = (
    "afmoe",
    "beam",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm_moe_dsa",
    "hunyuan_v1_moe",
    "longcat_flash",
    "mellum",
    "olmoe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe",
    "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker",
    "sarvam_mla",
    "solar_open",
)
"""Model types for which PEFT up to 0.21.2 takes the names below for the routed experts' (huggingface/peft#3711): those
that transformers 5.24 lists with the pattern "qwen2_moe" in conversion_mapping.py."""
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")
ROUTER_NAME = "gate"
"""Taken for the router's parameter, which is right, but PEFT has neither dropout nor DoRA for parameters."""

LOST_IN_RENAMING = {"laguna": "shared_experts"}
"""Model type -> modules whose tensors PEFT up to 0.21.2 drops: transformers 5.24 renames `mlp.shared_expert.` there, a
regular expression whose last dot takes the s of names that are right."""

MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Model types on which PEFT refuses the names below: fused kernels read those weights without the layer."""
BYPASSED_NAMES = ("conv1d", "out_proj")
BYPASSED_TYPES = ("ADALORA", "LORA", "RANDLORA", "XLORA")


def why_not_read(kind: str, peft_type: str, sites: Iterable[str], *, parameters: bool = True) -> str:
    """Why PEFT would lose or refuse a part of an adapter of this type on these sites; empty where it reads it.

    `kind` is the model's type. `parameters`: whether the adapter could sit on a parameter, too, because it has neither
    dropout nor DoRA.
    """
    for site in sites:
        last = site.rpartition(".")[2]
        if kind in MOE_AS_QWEN2 and peft_type == "LORA":
            if last in EXPERT_NAMES:
                return (
                    f"{site}: PEFT up to 0.21.2 takes the targets {', '.join(EXPERT_NAMES)} of {kind} for those "
                    "of the routed experts, and drops what is meant for the other layers of these names"
                )
            if last == ROUTER_NAME and not parameters:
                return (
                    f"{site}: PEFT up to 0.21.2 takes {ROUTER_NAME!r} of {kind} for a parameter, where it has "
                    "neither dropout nor DoRA"
                )
        if peft_type == "LORA" and LOST_IN_RENAMING.get(kind) in site.split("."):
            return f"{site}: PEFT up to 0.21.2 renames {LOST_IN_RENAMING[kind]} of {kind}, and drops their tensors"
        if kind in MAMBA and peft_type in BYPASSED_TYPES and last in BYPASSED_NAMES:
            return f"{site}: PEFT refuses {peft_type} on {' and '.join(BYPASSED_NAMES)} of {kind}"
    return ""


def target_modules(model: nn.Module, sites: Iterable[str]) -> list[str] | str:
    """PEFT's `target_modules` that mean these modules and no other: ends of names, whole names where an end fits
    another module too or is a number (which the layers of every list have), a regular expression where a whole name
    fits another module.
    """
    site_names = set(sites)
    names = module_names(model)
    targets: list[str] = []
    for end in sorted({site.rpartition(".")[2] for site in site_names}):
        matching_names = [name for name in names if matches((end,), name)]
        alone = site_names.issuperset(matching_names) and not end.isdigit()
        targets += [end] if alone else sorted(site for site in site_names if matches((end,), site))
    if {name for name in names if matches(tuple(targets), name)} == site_names:
        return targets
    return "|".join(re.escape(site) for site in sorted(site_names))


def module_names(model: nn.Module) -> list[str]:
    """The names of a base's modules, as they are without deltas."""
    found: list[str] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(tuple(inside)):
            continue
        ours = isinstance(module, Host) or name.rpartition(".")[2] == "graft_shared"
        if ours:
            inside.append(f"{name}.")
        if not ours or isinstance(module, LayerHost):
            found.append(name)
    return found


def model_type(model: Any) -> str:
    """transformers' name for the kind of model; empty for a model of another library."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def task(model: Any) -> dict[str, Any]:
    """PEFT's keys for what a model does, by its class: its task, or the class itself.

    PEFT's tasks for classifiers (SEQ_CLS, TOKEN_CLS, QUESTION_ANS) mean that the head was trained as a whole: PEFT
    replaces it, and raises an error where the file has no weights for it or a delta sits there. So they have no task.
    """
    if hasattr(model, "can_generate") and model.can_generate():
        return {"task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"}
    classes = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {"task_type": None, "auto_mapping": classes}


def why_not_peft(model: nn.Module, name: str = "default") -> str:
    """Why PEFT's format cannot hold this delta exactly, or an empty text where it can."""
    config = attachment(model).configs[name]
    method = METHODS[config.method].delta
    if method.peft is None:
        return f"PEFT has no method that computes what {config.method} does"
    if method.peft.why_not is not None and (reason := method.peft.why_not(config)):
        return reason
    for pattern, overrides in config.patterns.items():
        if unsupported := overrides.keys() - method.peft.patterns.keys():
            return f"PEFT has no pattern for {', '.join(sorted(unsupported))}, which {pattern!r} sets"
    for site, module in modules_of(model, name).items():
        if isinstance(module, Delta) and module.site.rows is not None:
            return f"{site} is a part of a layer, and PEFT has no name for one"
        if isinstance(module, Delta) and method.peft.why_not_at and (reason := method.peft.why_not_at(module.site)):
            return f"{site}: {reason}"
        if getattr(module, "offset_A", None) is not None:
            return f"init {config.init!r} took a part of W out, and PEFT's format has no place for a fixed offset"
        peft_keys = method.peft.tensors if site else method.peft.shared
        for key in module.state_dict():
            if key not in peft_keys:
                return f"PEFT's {method.peft.type} has no tensor for {key}"
    parameters = not config.dropout and not method.peft.constants.get("use_dora")
    return why_not_read(model_type(model), method.peft.type, attachment(model).sites[name], parameters=parameters)


def peft_config(model: nn.Module, config: DeltaConfig, layout: PeftLayout, sites: list[str]) -> dict[str, Any]:
    """PEFT's config: sites as suffixes where those mean the same, and what differs at a site under its full name."""
    on = hosts(model)
    config_json: dict[str, Any] = {"inference_mode": True, "peft_type": layout.type, "revision": None}
    if layout.type == "LORA":
        config_json |= {key: values[0] for key, values in NEUTRAL.items()} | {"init_lora_weights": True}
    if not isinstance(on[sites[0]], ModelHost):
        swapped = any(transposed(on[site]) for site in sites)
        config_json |= {key: values[0] for key, values in NEUTRAL_ANYWHERE.items()}
        config_json |= {"fan_in_fan_out": swapped, "target_modules": target_modules(model, sites)}
    patterns: dict[str, dict[str, Any]] = {key: {} for key in layout.patterns.values()}
    for site in sites:
        there = config_at(config, site)
        for ours, key in layout.patterns.items():
            if getattr(there, ours) != getattr(config, ours):
                patterns[key][re.escape(site)] = getattr(there, ours)
    fields = {key: getattr(config, ours) for ours, key in layout.fields.items()}
    first = next(m for m in _modules_on(on[sites[0]], config))
    facts = layout.facts(first.site, config) if layout.facts else {}
    return {**config_json, **patterns, **layout.constants, **fields, **facts}


def _modules_on(host: Host, config: DeltaConfig) -> Iterator[Delta]:
    return (d for d in host.deltas.values() if isinstance(d, Delta) and d.config.method == config.method)


def transposed(host: Host) -> bool:
    """Whether a state dict of the base holds this linear layer's weight as [d_in, d_out]."""
    return isinstance(host, LayerHost) and host.view.kind == "linear" and host.view.transposed
