"""PEFT's config: which method of ours it is, with which fields and patterns, and where it says that an adapter sits."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

from torch import nn

from graftlm.adapters.peft import NEUTRAL, NEUTRAL_ANYWHERE
from graftlm.config.schema import Count, Flag, build, config, expression
from graftlm.deltas import METHODS, Method
from graftlm.deltas.base import PeftLayout, matches
from graftlm.errors import AdapterError, nearest
from graftlm.model.sites import sites_of

READ = {"bias", "ensure_weight_tying", "lora_bias", "trainable_token_indices"}
"""Keys of PEFT's LORA of which an adapter that is read may have other values too."""

STARTS = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
"""Keys of PEFT's LORA about how factors start: of any value, where `init_lora_weights` left the base alone."""

HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",  # how the base stores its weight, which our views know
    "inference_mode",
    "init_lora_weights",
    "init_weights",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}

OTHERWISE = {
    "LILY": "PEFT mixes the B of Lily by the mean over all tokens of the batch, `lily` here for each token by itself",
}
"""Types of PEFT that compute something else than the method of that name here, and what."""

UNSET: tuple[Any, ...] = (None, False, [], {})
"""Values at which a key that is unknown here (of a later version) can change nothing."""


def method_of(config_json: Mapping[str, Any], file: Path) -> tuple[str, Method]:
    """The method whose layout has this type, and these values where several methods have it."""
    kind = config_json.get("peft_type")
    of_kind = [(n, m, m.delta.peft) for n, m in METHODS.items() if m.delta.peft and m.delta.peft.type == kind]
    for name, method, layout in of_kind:
        if not _other_constants(config_json, layout):
            return name, method
    if of_kind:
        says = ", ".join(f"{key}={value!r}" for key, value in _other_constants(config_json, of_kind[-1][2]).items())
        raise AdapterError(
            f"{file}: {says} changes what the adapter computes, and is not supported here", code="unsupported-setting"
        )
    if kind in OTHERWISE:
        raise AdapterError(
            f"{file}: {OTHERWISE[kind]}, so that this adapter would compute something else. Use it in PEFT, or train "
            "one here",
            code="unsupported-setting",
        )
    peft_types = [m.delta.peft.type for m in METHODS.values() if m.delta.peft is not None]
    raise AdapterError(
        f"{file}: peft_type {kind!r} is no method here. {nearest(str(kind), peft_types)}", code="unknown-peft-type"
    )


def _other_constants(config_json: Mapping[str, Any], layout: PeftLayout) -> dict[str, Any]:
    """The keys at which a config is another method than the layout's, as it has them."""
    defaults = {**layout.constants, **layout.defaults}
    found = {key: defaults[key] if config_json.get(key) is None else config_json[key] for key in layout.constants}
    return {key: value for key, value in found.items() if value != layout.constants[key]}


def check_keys(model: nn.Module, config_json: Mapping[str, Any], method: Method, file: Path) -> None:
    """Raise AdapterError for a key that would have to be ignored."""
    layout = method.delta.peft
    assert layout is not None
    lora = layout.type == "LORA"
    neutral = NEUTRAL if lora else {}
    known_keys = {*HARMLESS, *NEUTRAL_ANYWHERE, *layout.fields.values(), *layout.patterns.values(), *layout.harmless}
    known_keys |= {*layout.constants, *(READ | STARTS if lora else ())}
    if layout.facts is not None:
        first = sites_of(model, method.config())  # type: ignore[call-arg]
        known_keys |= set(layout.facts(first[0], method.config()))  # type: ignore[call-arg]
    for key, value in config_json.items():
        unset = any(type(value) is type(each) and value == each for each in UNSET)
        if key in known_keys or unset or value in neutral.get(key, ()):
            continue
        if key == "target_parameters":
            raise AdapterError(
                f"{file}: target_parameters={value!r} adapts the experts of a layer that are one parameter, which no "
                "delta here can. Merge it in PEFT (merge_and_unload) and use the merged model as the base",
                code="fused-experts",
            )
        if key in neutral:
            raise AdapterError(
                f"{file}: {key}={value!r} changes what the adapter computes, and is not supported here",
                code="unsupported-setting",
            )
        raise AdapterError(
            f"{file}: {key!r} is unknown here, so what it means would be lost. {nearest(key, {*known_keys, *neutral})}",
            code="unknown-key",
        )
    start = config_json.get("init_lora_weights")
    if start not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise AdapterError(
            f"{file}: init_lora_weights={start!r} means that the stored factors do not belong to "
            "the untouched base: save it with path_initial_model_for_weight_conversion in PEFT",
            code="changed-base-weights",
        )
    if config_json.get("lora_bias") and config_json.get("use_dora"):
        raise AdapterError(
            f"{file}: lora_bias=True with use_dora=True: PEFT itself does not have both", code="unsupported-setting"
        )


def method_fields(config_json: Mapping[str, Any], method: Method, file: Path) -> dict[str, Any]:
    """Our fields, as the config and PEFT's defaults have them."""
    layout = method.delta.peft
    assert layout is not None
    defaults = {field.name: field.default for field in fields(method.config)}
    tree = {}
    for ours, key in layout.fields.items():
        default = layout.defaults.get(key, defaults[ours])
        value = config_json.get(key, default)
        if value is None and ours != "dropout" and type(default) in (int, float):
            raise AdapterError(
                f"{file}: {key} is null, and without a number it cannot be said what the adapter adds",
                code="missing-value",
            )
        if value is not None and value is not MISSING:
            tree[ours] = value
    return tree | (dict(layout.translate(dict(config_json))) if layout.translate is not None else {})


def site_patterns(
    config_json: Mapping[str, Any], layout: PeftLayout, sites: Mapping[str, str], file: Path
) -> dict[str, dict[str, Any]]:
    """PEFT looks up each pattern key by itself, we look up all fields of a site at once: so, one entry a site.

    Patterns are about the names that the model had in training: `sites` has them by the names here.
    """
    found: dict[str, dict[str, Any]] = {}
    for ours, key in layout.patterns.items():
        patterns = config_json.get(key) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(
                f"{file}: {key} must be a mapping from patterns to numbers, this is {patterns!r}",
                code="invalid-pattern",
            )
        for here, there in sites.items():
            for pattern, value in patterns.items():
                try:
                    hit = re.match(rf"(.*\.)?({pattern})$", there)
                except re.error as error:
                    raise AdapterError(
                        f"{file}: {key}: {pattern!r} is no regular expression: {error}", code="invalid-pattern"
                    ) from None
                if hit:
                    found.setdefault(re.escape(here), {})[ours] = value
                    break
    return found


@config
class Where:
    """The keys of PEFT's config that say where an adapter sits."""

    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: Count | tuple[Count, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: tuple[Count, ...] | dict[str, tuple[Count, ...]] | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    lora_bias: Flag | None = None

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names a module or a parent of it. PEFT compares the ends of names."""
        parts = module.split(".")
        inside = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(name.endswith(end) for name in inside for end in self.modules_to_save or ())

    def modules_by_entry(self, modules: Sequence[str], all_linear: Sequence[str]) -> dict[str, list[str]]:
        """Entry of `target_modules` -> those of the modules that it names."""
        entries = self.target_modules or ()
        if isinstance(entries, tuple):
            return {end: [module for module in modules if matches((end,), module)] for end in entries}
        if entries.lower() == "all-linear":
            return {entries: list(all_linear)}
        return {entries: [module for module in modules if re.fullmatch(entries, module)]}

    def takes(self, module: str) -> bool:
        """Whether PEFT puts an adapter on a module that `target_modules` names."""
        if self.saves(module) or (self.exclude_modules is not None and matches(self.exclude_modules, module)):
            return False
        return isinstance(self.target_modules, str) or module in (self.target_modules or ()) or self._has_layer(module)

    def _has_layer(self, module: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == ():
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for pattern in [each for each in patterns or () if each] or [r"[^.]*"]:
            if found := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", module):
                return int(found[1]) in (layers if isinstance(layers, tuple) else (layers,))
        return False


def read_where(config_json: Mapping[str, Any], file: Path) -> Where:
    """The part of a config that says where an adapter sits; RecipeError for a value of a wrong type."""
    names = {field.name for field in fields(Where)}
    where = build(Where, {key: value for key, value in config_json.items() if key in names}, source=str(file))
    for key in ("target_modules", "exclude_modules"):
        if isinstance(pattern := getattr(where, key), str):
            try:
                expression(pattern)
            except ValueError as error:
                raise AdapterError(f"{file}: {key}: {pattern!r}: {error}", code="invalid-pattern") from None
    return where
