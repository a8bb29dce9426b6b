"""Adapters that another tool wrote in PEFT's layout: which deltas of ours they are.

    <site>.lora_A.weight ...                   the method itself, by its PeftLayout
    <module>.weight, .bias                     modules_to_save: in place of the base's       -> full
    <site>.trainable_tokens_delta              rows of some tokens, in place of the base's   -> trainable-tokens
    <site>.lora_B.bias, <layer>.bias           lora_bias; bias: all or lora_only             -> bitfit
    <layer>.base_layer.weight                  a copy of a frozen weight: it must be the base's

The tensors say where an adapter sits, the config what they mean. A key of the config that is left out has PEFT's
default. Whatever would have to be ignored to load an adapter is an AdapterError.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from graftlm.config.schema import Count, Flag, build, config, expression
from graftlm.deltas import METHODS, Method
from graftlm.deltas.base import DeltaConfig, PeftLayout, Targets, matches
from graftlm.deltas.bitfit import BitFitConfig
from graftlm.deltas.full import FullConfig
from graftlm.deltas.trainable_tokens import TrainableTokensConfig
from graftlm.errors import AdapterError, TargetError, nearest, numbered
from graftlm.model.layers.bases import LinearBase, view
from graftlm.model.layers.hosts import LayerHost
from graftlm.model.layers.sites import Place, config_at, find_sites, output_head, places, sites_of

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."

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

UNSET: tuple[Any, ...] = (None, False, [], {})
"""Values at which a key that is unknown here (of a later version) can change nothing."""


@dataclass(frozen=True)
class Member:
    """A delta of ours that an adapter of another tool is, or one of several."""

    name: str
    """What follows the adapter's name in that of the delta; empty for the method itself."""
    config: DeltaConfig
    layout: PeftLayout | None
    tensors: dict[str, Tensor]
    """By the keys of that layout; None is our own (`graftlm/adapters/store.py`)."""


class Adapter(NamedTuple):
    """What was read: the deltas in the order in which they act, and remarks on how it was read."""

    members: list[Member]
    remarks: list[str]


def read_adapter(model: nn.Module, stored: dict[str, Any], tensors: Mapping[str, Tensor], file: Path) -> Adapter:
    """The deltas that PEFT's (config, tensors) are on this model; AdapterError for what cannot be them.

    `file` holds the tensors and is named in messages; the config lies beside it. Nothing is attached.
    """
    name, method = method_of(stored, file.with_name(CONFIG))
    layout = method.delta.peft
    assert layout is not None
    _check_keys(model, stored, method, file.with_name(CONFIG))
    if "model" not in method.delta.kinds:
        return _Reader(model, stored, name, method, layout, file).read(tensors)
    check_numbers(tensors, file)  # a prompt or a prefix: one tensor, and no layer
    tree = {"method": name, **_fields(stored, method, file.with_name(CONFIG))}
    config = build(method.config, tree, source=str(file.with_name(CONFIG)))
    return Adapter([Member("", config, layout, dict(tensors))], [])


def method_of(stored: Mapping[str, Any], file: Path) -> tuple[str, Method]:
    """The method whose layout has this type, and these values where several methods have it."""
    kind = stored.get("peft_type")
    of_kind = [(n, m, m.delta.peft) for n, m in METHODS.items() if m.delta.peft and m.delta.peft.type == kind]
    for name, method, layout in of_kind:
        if not _other_constants(stored, layout):
            return name, method
    if of_kind:
        says = ", ".join(f"{key}={value!r}" for key, value in _other_constants(stored, of_kind[-1][2]).items())
        raise AdapterError(f"{file}: {says} changes what the adapter computes, and is not supported here")
    known = [m.delta.peft.type for m in METHODS.values() if m.delta.peft is not None]
    raise AdapterError(f"{file}: peft_type {kind!r} is no method here. {nearest(str(kind), known)}")


def _other_constants(stored: Mapping[str, Any], layout: PeftLayout) -> dict[str, Any]:
    """The keys at which a config is another method than the layout's, as it has them."""
    defaults = {**layout.constants, **layout.defaults}
    found = {key: defaults[key] if stored.get(key) is None else stored[key] for key in layout.constants}
    return {key: value for key, value in found.items() if value != layout.constants[key]}


def check_numbers(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise AdapterError for tensors that are neither finite floating-point numbers nor indices."""
    problems = []
    for key, t in tensors.items():
        if not t.is_floating_point() and t.dtype not in (torch.int32, torch.int64):
            problems.append(f"{key}: dtype {t.dtype}")
        elif t.is_floating_point() and not _widened(t).isfinite().all():
            problems.append(f"{key}: holds NaN or infinity")
    if problems:
        raise AdapterError(f"{file}: {len(problems)} tensors cannot be weights:\n{numbered(problems)}")


def _widened(t: Tensor) -> Tensor:
    """The tensor in float32 if its numbers have 8 bits, for which torch has few operations."""
    return t.float() if t.is_floating_point() and t.itemsize == 1 else t


# Keys ------------------------------------------------------------------------------------------------------------

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile, FSDP and recomputation put in when they wrap a module."""


@dataclass(frozen=True)
class Key:
    """A key of a file in parts."""

    stored: str
    module: str
    """The module that it is about, by its name in the model that was trained; empty for what all sites share."""
    rest: str
    """`lora_A.weight`, `weight`, `base_layer.weight` ..."""
    adapter: str = ""
    """The name of the adapter, where the key has one."""

    @property
    def plain(self) -> str:
        """The key as PEFT writes it."""
        return f"{PREFIX}{self.module}.{self.rest}" if self.module else self.rest


def parse_key(stored: str, layout: PeftLayout) -> Key:
    """Take a key apart: wrappers, the prefix and the adapter's name are left out."""
    key = ".".join(part for part in stored.split(".") if part not in WRAPPERS).removeprefix("module.")
    for shared in layout.shared.values():
        if found := re.fullmatch(rf"base_model\.{shared}(?:\.([^.]+))?", key):
            return Key(stored, "", f"base_model.{shared}", found[1] or "")
    key = key.removeprefix(PREFIX)
    for suffix in (*layout.tensors.values(), *layout.embedding.values(), "lora_B.bias", TOKENS):
        stem, _, rest = suffix.partition(".")
        # PEFT leaves `.weight` behind a magnitude out of its files, and has it in its modules.
        end = rf"\.{rest}" if rest else r"(?:\.weight)?"
        if found := re.fullmatch(rf"(.+?)(?:\.token_adapter)?\.{stem}(?:\.((?!weight$)[^.]+))?{end}", key):
            return Key(stored, found[1], suffix, found[2] or "")
    if found := re.fullmatch(r"(.+?)(?:\.token_adapter)?\.(?:base_layer|original_module)\.([^.]+)", key):
        return Key(stored, found[1], f"base_layer.{found[2]}")
    if found := re.fullmatch(r"(.+)\.modules_to_save(?:\.([^.]+))?\.(.+)", key):
        module, _, rest = f"{found[1]}.{found[3]}".rpartition(".")
        return Key(stored, module, rest, found[2] or "")
    module, _, rest = key.rpartition(".")
    return Key(stored, module, rest)


TOKENS = "trainable_tokens_delta"

Renaming = Sequence[tuple[str, str]]
"""(beginning of a name in the file, the same in the model): the first that fits a name is put in its place."""


def renamings(model: Any) -> list[Renaming]:
    """How the names of a language model differ where it is alone, inside of a vision-language model (from transformers
    4.52 on, and before), and without its head."""
    alone, inside, before, head = "model.", "model.language_model.", "language_model.model.", "language_model.lm_head"
    body = f"{getattr(model, 'base_model_prefix', '') or 'model'}."
    return [
        [(inside, alone)],
        [(alone, inside)],
        [("language_model.", "")],
        [(alone, before), ("lm_head", head)],
        [(before, inside), (head, "lm_head")],
        [(inside, before), ("lm_head", head)],
        [(body, "")],
        [("", body)],
    ]


def renamed(name: str, by: Renaming) -> str:
    """The name in the model of what a file calls `name`."""
    return next((new + name.removeprefix(old) for old, new in by if name.startswith(old)), name)


# Configs ---------------------------------------------------------------------------------------------------------


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
        """Whether `modules_to_save` names a module, or one that it lies in: by the end of a name, as in PEFT."""
        parts = module.split(".")
        inside = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(name.endswith(end) for name in inside for end in self.modules_to_save or ())

    def named(self, modules: Sequence[str], all_linear: Sequence[str]) -> dict[str, list[str]]:
        """Entry of `target_modules` -> those of the modules that it names."""
        wanted = self.target_modules or ()
        if isinstance(wanted, tuple):
            return {end: [module for module in modules if matches((end,), module)] for end in wanted}
        if wanted.lower() == "all-linear":
            return {wanted: list(all_linear)}
        return {wanted: [module for module in modules if re.fullmatch(wanted, module)]}

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


def read_where(stored: Mapping[str, Any], file: Path) -> Where:
    """The part of a config that says where an adapter sits; RecipeError for a value of a wrong type."""
    known = {field.name for field in fields(Where)}
    where = build(Where, {key: value for key, value in stored.items() if key in known}, source=str(file))
    for key in ("target_modules", "exclude_modules"):
        if isinstance(pattern := getattr(where, key), str):
            try:
                expression(pattern)
            except ValueError as error:
                raise AdapterError(f"{file}: {key}: {pattern!r}: {error}") from None
    return where


def _check_keys(model: nn.Module, stored: Mapping[str, Any], method: Method, file: Path) -> None:
    """Raise AdapterError for a key that would have to be ignored."""
    layout = method.delta.peft
    assert layout is not None
    lora = layout.type == "LORA"
    neutral = NEUTRAL if lora else {}
    known = {*HARMLESS, *NEUTRAL_ANYWHERE, *layout.fields.values(), *layout.patterns.values(), *layout.harmless}
    known |= {*layout.constants, *(READ | STARTS if lora else ())}
    if layout.facts is not None:
        first = sites_of(model, method.config())  # type: ignore[call-arg]
        known |= set(layout.facts(first[0], method.config()))  # type: ignore[call-arg]
    for key, value in stored.items():
        unset = any(type(value) is type(each) and value == each for each in UNSET)
        if key in known or unset or value in neutral.get(key, ()):
            continue
        if key == "target_parameters":
            raise AdapterError(
                f"{file}: target_parameters={value!r} adapts the experts of a layer that are one parameter, which no "
                "delta here can. Merge it in PEFT (merge_and_unload) and use the merged model as the base"
            )
        if key in neutral:
            raise AdapterError(f"{file}: {key}={value!r} changes what the adapter computes, and is not supported here")
        raise AdapterError(
            f"{file}: {key!r} is unknown here, so what it means would be lost. {nearest(key, {*known, *neutral})}"
        )
    start = stored.get("init_lora_weights")
    if start not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise AdapterError(
            f"{file}: init_lora_weights={start!r} means that the stored factors do not belong to "
            "the untouched base: save it with path_initial_model_for_weight_conversion in PEFT"
        )
    if stored.get("lora_bias") and stored.get("use_dora"):
        raise AdapterError(f"{file}: lora_bias=True with use_dora=True: PEFT itself does not have both")


def _fields(stored: Mapping[str, Any], method: Method, file: Path) -> dict[str, Any]:
    """Our fields, as the config and PEFT's defaults have them."""
    layout = method.delta.peft
    assert layout is not None
    defaults = {field.name: field.default for field in fields(method.config)}
    tree = {}
    for ours, key in layout.fields.items():
        default = layout.defaults.get(key, defaults[ours])
        value = stored.get(key, default)
        if value is None and ours != "dropout" and type(default) in (int, float):
            raise AdapterError(f"{file}: {key} is null, and without a number it cannot be said what the adapter adds")
        if value is not None and value is not MISSING:
            tree[ours] = value
    return tree | (dict(layout.translate(dict(stored))) if layout.translate is not None else {})


def _patterns(
    stored: Mapping[str, Any], layout: PeftLayout, sites: Mapping[str, str], file: Path
) -> dict[str, dict[str, Any]]:
    """PEFT looks up each pattern key by itself, we look up all fields of a site at once: so, one entry a site.

    Patterns are about the names that the model had in training: `sites` has them by the names here.
    """
    found: dict[str, dict[str, Any]] = {}
    for ours, key in layout.patterns.items():
        patterns = stored.get(key) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{file}: {key} must be a mapping from patterns to numbers, this is {patterns!r}")
        for here, there in sites.items():
            for pattern, value in patterns.items():
                try:
                    hit = re.match(rf"(.*\.)?({pattern})$", there)
                except re.error as error:
                    raise AdapterError(f"{file}: {key}: {pattern!r} is no regular expression: {error}") from None
                if hit:
                    found.setdefault(re.escape(here), {})[ours] = value
                    break
    return found


# Tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """A tensor of a file, with the names that its module has in the file and in this model."""

    stored: str
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
    """Of the method itself, by plain key; and what is of no kind, to be refused with the nearest names."""
    sites: dict[str, str] = field(default_factory=dict)
    """Where the method sits: name in this model -> name in the file."""
    weights: dict[tuple[str, str], Named] = field(default_factory=dict)
    """(module, weight or bias) -> what stands in place of the base's."""
    copies: dict[tuple[str, str], Named] = field(default_factory=dict)
    """(module, weight or bias) -> what should be equal to the base's."""
    rows: dict[str, Named] = field(default_factory=dict)
    """Module -> the rows of its tokens."""
    shifts: dict[str, Named] = field(default_factory=dict)
    """Module -> the bias of lora_B."""


class _Reader:
    """One adapter while it is read: the model, the config, and what is to be said."""

    def __init__(
        self, model: Any, stored: dict[str, Any], method_name: str, method: Method, layout: PeftLayout, file: Path
    ) -> None:
        self.model, self.stored, self.file = model, stored, file
        self.method_name, self.method, self.layout = method_name, method, layout
        self.config_file = file.with_name(CONFIG)
        self.where = read_where(stored, self.config_file)
        self.lora = layout.type == "LORA"
        self.places = places(model)
        self.modules = {name for name, _ in model.named_modules()}
        self.ends = _ends(model, self.places)
        self.by: Renaming = []
        self.remarks: list[str] = []
        self.problems: list[str] = []

    def read(self, tensors: Mapping[str, Tensor]) -> Adapter:
        named = self._named(tensors)
        self._check_experts(named)
        held = self._sorted(named)
        copies = {one.stored for one in held.copies.values()}
        check_numbers({key: t for key, t in tensors.items() if key not in copies}, self.file)
        for one in (*held.weights.values(), *held.copies.values(), *held.rows.values(), *held.shifts.values()):
            if not one.tensor.is_floating_point():
                raise AdapterError(f"{self.file}: {one.stored}: dtype {one.tensor.dtype}, which no weight has")
        sites = self._sites(held)
        config = self._main(sites)
        ids = self._token_ids(held)
        changes, shifts = self._changes(held)
        members = [
            self._modules(changes, shifts, ids),
            self._tokens(held, ids),
            Member("", config, self.layout, {key: _widened(tensor) for key, tensor in held.main.items()}),
            self._biases(shifts.keys() - changes.keys(), shifts, held, config),
        ]
        if self.problems:
            raise AdapterError(f"{self.file}: does not fit this model:\n{numbered(sorted(self.problems))}")
        return Adapter([member for member in members if member is not None], self.remarks)

    # Names -------------------------------------------------------------------------------------------------------

    def _named(self, tensors: Mapping[str, Tensor]) -> list[Named]:
        """Every tensor with its names; those of the file are mapped onto this model's where they are others."""
        keys: dict[str, Key] = {}
        for key in (parse_key(stored, self.layout) for stored in tensors):
            other = keys.get(key.plain)
            if other is not None and not torch.equal(tensors[other.stored], tensors[key.stored]):
                raise AdapterError(f"{self.file}: {other.stored} and {key.stored} are one tensor with two values")
            keys[key.plain] = key
        adapters = sorted({key.adapter for key in keys.values() if key.adapter})
        if len(adapters) > 1:
            said = f"{len(adapters)} adapters ({', '.join(adapters)}): save each into a folder of its own"
            raise AdapterError(f"{self.file}: holds the tensors of {said}")
        whole = {plain: tensors[key.stored] for plain, key in keys.items()}
        if self.layout.read is not None:
            whole = self.layout.read(self.stored, whole)
        unknown = {key.module for key in keys.values()} - self.modules
        fits = [(sum(renamed(name, by) in self.modules for name in unknown), by) for by in renamings(self.model)]
        most = max(count for count, _ in fits)
        self.by = next(by for count, by in fits if count == most) if most else []
        self._remark_on_names(keys.values(), adapters)
        found = [(keys[plain], tensor) for plain, tensor in whole.items()]
        return [Named(key.stored, key.module, self._here(key.module), key.rest, tensor) for key, tensor in found]

    def _remark_on_names(self, keys: Collection[Key], adapters: Sequence[str]) -> None:
        said = [f"without {part}" for part in WRAPPERS if any(part in key.stored.split(".") for key in keys)]
        said += [f"without the adapter's name {name!r}" for name in adapters]
        if not any(PREFIX in key.stored for key in keys):
            said.append(f"with {PREFIX} before them")
        said += [f"{new or '(nothing)'} for {old or '(nothing)'}" for old, new in self.by]
        if said:
            self.remarks.append(f"the names of its tensors were mapped onto this model's: {', '.join(said)}")

    def _here(self, name: str) -> str:
        """The name in this model of what the file calls `name`."""
        return name if name in self.modules else renamed(name, self.by)

    def _there(self, name: str) -> str:
        """What the file calls a module of this model."""
        there = renamed(name, [(new, old) for old, new in self.by])
        return there if self._here(there) == name else name

    def _was_there(self, name: str) -> bool:
        """Whether the model that was trained can have had a module: not, where only a part of this model is like it."""
        return not self.by or name in self.ends or self._there(name) != name

    def _check_experts(self, tensors: Sequence[Named]) -> None:
        fused = [name for name in self.modules if name.endswith(".experts") and f"{name}.0" not in self.modules]
        for one in tensors:
            if fused and re.search(r"\.experts\.\d+\.", one.here) and one.here not in self.modules:
                raise AdapterError(
                    f"{self.file}: {one.stored} is about one expert, and this model has all of a layer in one "
                    f"parameter ({fused[0]}), as transformers 5 loads it. No delta here can sit there: merge the "
                    "adapter in PEFT (merge_and_unload), which converts it, and use the merged model as the base"
                )

    # What tensors are --------------------------------------------------------------------------------------------

    def _sorted(self, tensors: Iterable[Named]) -> Contents:
        held = Contents()
        own = {*self.layout.tensors.values(), *self.layout.embedding.values()}
        for one in tensors:
            place = (one.here, one.rest.removeprefix("base_layer."))
            bias = place[1] == "bias" and self.where.bias in ("all", "lora_only")
            trained = bias or (place[1] == one.rest and self._saved(one))
            if not one.here or one.rest in own:
                held.main[one.plain] = one.tensor
                if self._kind(one.here) in self.method.delta.kinds:
                    held.sites[one.here] = one.there
            elif one.rest == TOKENS and self.lora:
                held.rows[one.here] = one
            elif one.rest == "lora_B.bias" and self.where.lora_bias:
                held.shifts[one.here] = one
            elif one.here in self.modules and trained:
                held.weights[place] = one
            elif one.here in self.modules and (one.rest.startswith("base_layer.") or one.here in self.ends):
                held.copies[place] = one
            else:
                held.main[one.plain] = one.tensor
        return held

    def _saved(self, one: Named) -> bool:
        """Whether a module was trained whole: PEFT names one end of a model, and may have tied the other to it."""
        tied = bool(self.stored.get("ensure_weight_tying")) and one.here in self.ends
        return any(self.where.saves(self._there(end)) for end in self.ends) if tied else self.where.saves(one.there)

    def _kind(self, module: str) -> str | None:
        return self.places[module].kind if module in self.places else None

    def _view(self, module: str) -> LinearBase | None:
        return view(self.places[module].module) if module in self.places else None

    # The method itself -------------------------------------------------------------------------------------------

    def _sites(self, held: Contents) -> dict[str, str]:
        """Where the method sits, in the model's order: where it has tensors, and where it lacks some by mistake.

        An entry of `target_modules` for which there is no tensor at all counts for nothing: lists of names are often
        used for models that have only some of them. One that has tensors has them wherever PEFT takes it.
        """
        there = {name: self._there(name) for name in self.places if self._kind(name) in self.method.delta.kinds}
        trained = {name: there[name] for name in there if self._was_there(name)}
        linear = [trained[name] for name in trained if self._kind(name) == "linear" and name not in self.ends]
        having = set(held.sites.values())
        sites, nowhere = set(held.sites), []
        for entry, modules in self.where.named(list(trained.values()), linear).items():
            taken = {module for module in modules if self.where.takes(module)}
            if having & taken:
                sites |= {name for name in trained if trained[name] in taken}
            elif taken or not modules:
                nowhere.append(entry)
        if not sites:
            such = next(iter(held.main), "none")
            raise AdapterError(
                f"{self.file}: does not fit this model: none of its tensors belongs to a layer of it that "
                f"{self.method_name} can sit on; the first is {such}. {nearest(such.removeprefix(PREFIX), there)}"
            )
        if nowhere:
            self.remarks.append(f"target_modules also names {', '.join(nowhere)}, for which it has no tensors")
        return {name: there[name] for name in there if name in sites}

    def _main(self, sites: Mapping[str, str]) -> DeltaConfig:
        tree = _fields(self.stored, self.method, self.config_file)
        if all(self._kind(site) == "embedding" for site in sites):
            tree.pop("dropout", None)  # ids have no elements that could be dropped
        kinds = self.method.delta.kinds
        tree["method"] = self.method_name
        tree["targets"] = self._targets(list(sites), kinds, self.where.target_modules)
        config = build(self.method.config, tree, source=str(self.config_file))
        return replace(config, patterns=_patterns(self.stored, self.layout, sites, self.config_file))

    def _targets(self, sites: list[str], kinds: Sequence[str], given: Targets | None = None) -> Targets:
        """Targets that mean these sites: the given ones, or the sites' names."""
        for targets in (given, tuple(sites)):
            try:
                if targets and find_sites(self.model, targets, kinds) == sites:
                    return targets
            except TargetError:
                continue
        return "|".join(re.escape(site) for site in sites)

    # What stands in place of the base's --------------------------------------------------------------------------

    def _changes(self, held: Contents) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Module -> W' - W, float32 [d_out, d_in], and b' - b [d_out], for what is not the base's own."""
        changes: dict[str, Tensor] = {}
        shifts: dict[str, Tensor] = {}
        copied: set[str] = set()
        for (module, parameter), one, is_copy in [
            *((place, one, False) for place, one in held.weights.items()),
            *((place, one, True) for place, one in held.copies.items()),
        ]:
            own = self._own(module, parameter)
            if own is None or own.shape != one.tensor.shape:
                self.problems.append(self._does_not_fit(one, own))
                continue
            rows = copied_rows(own, one.tensor.to(own.device)) if is_copy else torch.zeros(len(own), dtype=torch.bool)
            if rows.all():
                continue
            change = one.tensor.to(own.device, torch.float32) - own.float()
            if is_copy:
                change[rows] = 0
                first = int(rows.long().argmin())  # of those that are not the same
                if parameter == "bias" or 2 * first < len(rows) or not change.isfinite().all():
                    self.problems.append(f"{one.stored}: is another base's: this adapter does not belong to it")
                    continue
                if (module, parameter) in held.weights:
                    continue
                said = f"from row {first} on, {module} is the adapter's: its vocabulary had been resized"
                self.remarks.append(said)
                copied.add(module)
            base = self._view(module)
            if not change.any():
                continue
            if base is None:
                what = type(self.model.get_submodule(module)).__name__
                can = "weights can be replaced in linear layers, embeddings and norms"
                self.problems.append(f"{one.stored}: {module} is a {what}; {can}")
            elif parameter == "weight":
                changes[module] = change.T if base.transposed else change
            else:
                shifts[module] = change
        self._tie(changes, copied)
        self._check_complete(held)
        return changes, shifts

    def _own(self, module: str, parameter: str) -> Tensor | None:
        """A parameter of the base, as its state dict lays it out."""
        base = self._view(module)
        if base is not None and parameter in ("weight", "bias"):
            return base.stored_bias if parameter == "bias" else base.store(base.stored_weight)
        found = getattr(self.model.get_submodule(module), parameter, None)
        return found if isinstance(found, Tensor) else None

    def _does_not_fit(self, one: Named, own: Tensor | None) -> str:
        if own is None:
            return f"unexpected: {one.stored}. This model's {one.here} has no {one.rest}"
        said = f"{one.stored}: has shape {list(one.tensor.shape)}, this model needs {list(own.shape)}"
        if one.here in self.ends and one.tensor.dim() == 2 and one.tensor.shape[1:] == own.shape[1:]:
            rows = one.tensor.shape[0]
            said += (
                f". The vocabulary was resized to {rows} when it was trained: resize the base's embeddings too "
                f"(model.resize_token_embeddings({rows}) in transformers), save it with the tokenizer of the adapter, "
                "and use that as the base"
            )
        return said

    def _tie(self, changes: dict[str, Tensor], copied: set[str]) -> None:
        """A weight that embeddings and head share was resized for both, also where the file has it once."""
        if len(self.ends) == 2 and self._tied():
            for one, other in (self.ends, self.ends[::-1]):
                if one in copied and other not in changes:
                    changes[other] = changes[one].T

    def _tied(self) -> bool:
        one, other = (self.places[end].module for end in self.ends)
        return one.weight is other.weight

    def _check_complete(self, held: Contents) -> None:
        """Note what is missing of the modules to save, and of the biases where there are some."""
        for module in self.places:
            base, there = self._view(module), self._there(module)
            if base is None or not self._was_there(module):
                continue
            saved = self.where.saves(there)
            if saved and (module, "weight") not in held.weights:
                self.problems.append(f"missing: {PREFIX}{there}.weight, which modules_to_save names")
            has_bias = base.stored_bias is not None and (module, "bias") not in held.weights
            some = any(parameter == "bias" for _, parameter in held.weights)
            trained = self.where.bias == "all" or (self.where.bias == "lora_only" and module in held.sites)
            if has_bias and (saved or (trained and some)):
                self.problems.append(
                    f"missing: {PREFIX}{there}.bias, which {'modules_to_save' if saved else 'bias'} names"
                )

    def _modules(
        self, changes: Mapping[str, Tensor], shifts: Mapping[str, Tensor], ids: Mapping[str, Tensor]
    ) -> Member | None:
        tensors: dict[str, Tensor] = {}
        sites = [module for module in self.places if module in changes]
        for module in sites:
            base, change = self._view(module), changes[module].clone()
            assert base is not None
            if module in ids:  # tokens come on top, whole
                (change if base.kind == "linear" else change.T)[ids[module]] = 0
            tensors[f"{PREFIX}{module}.D"] = change
            if base.stored_bias is not None:
                tensors[f"{PREFIX}{module}.d"] = shifts.get(module, torch.zeros(base.d_out))
        if not sites:
            return None
        config = FullConfig(targets=self._targets(sites, METHODS["full"].delta.kinds))
        return Member("modules", config, None, tensors)

    # Tokens and biases -------------------------------------------------------------------------------------------

    def _token_ids(self, held: Contents) -> dict[str, Tensor]:
        """Module -> the ids of its tokens [k]."""
        given, found = self.where.trainable_token_indices, dict[str, Tensor]()
        if not given and not held.rows:
            return found
        if not held.rows or not given:
            what = f"trainable_token_indices={given!r}, and {len(held.rows)} modules with {TOKENS}"
            raise AdapterError(f"{self.file}: {what}: the one is nothing without the other")
        for module, one in held.rows.items():
            ids = given if isinstance(given, tuple) else _by_end(given, one.there)
            base = self._view(module)
            if ids is None or base is None or base.kind == "norm":
                self.problems.append(f"{one.stored}: trainable_token_indices says nothing about {one.there}")
                continue
            count, width = (base.d_in, base.d_out) if base.kind == "embedding" else (base.d_out, base.d_in)
            if list(one.tensor.shape) != [len(ids), width]:
                wanted = f"for {len(ids)} tokens this model needs {[len(ids), width]}"
                self.problems.append(f"{one.stored}: has shape {list(one.tensor.shape)}, {wanted}")
            elif max(ids) >= count or len(set(ids)) < len(ids):
                self.problems.append(f"trainable_token_indices: {ids} are not {len(ids)} of the {count} of {module}")
            else:
                found[module] = torch.tensor(ids)
        return found

    def _tokens(self, held: Contents, ids: Mapping[str, Tensor]) -> Member | None:
        rows = {module: held.rows[module].tensor for module in ids}
        ids = dict(ids)
        if len(self.ends) == 2 and self._tied() and self.ends[0] in rows and self.ends[1] not in rows:
            rows[self.ends[1]], ids[self.ends[1]] = rows[self.ends[0]], ids[self.ends[0]]
        sites = [module for module in self.places if module in rows]
        if not sites:
            return None
        tokens = {module: tuple(ids[module].tolist()) for module in sites}
        targets = self._targets(sites, METHODS["trainable-tokens"].delta.kinds)
        others = {re.escape(module): {"tokens": list(own)} for module, own in tokens.items() if own != tokens[sites[0]]}
        config = TrainableTokensConfig(tokens=tokens[sites[0]], targets=targets, patterns=others)
        return Member("tokens", config, None, {f"{PREFIX}{module}.T": _widened(rows[module]) for module in sites})

    def _biases(
        self, changed: Collection[str], shifts: Mapping[str, Tensor], held: Contents, config: DeltaConfig
    ) -> Member | None:
        deltas = {module: shifts[module] for module in changed}
        for module in held.sites if self.where.lora_bias else ():
            base, one = self._view(module), held.shifts.get(module)
            assert base is not None
            if one is None:
                self.problems.append(f"missing: {PREFIX}{held.sites[module]}.lora_B.bias, which lora_bias names")
            elif list(one.tensor.shape) != [base.d_out]:
                shape = f"has shape {list(one.tensor.shape)}, this model needs {[base.d_out]}"
                self.problems.append(f"{one.stored}: {shape}")
            else:
                at: Any = config_at(config, module)
                scale = at.alpha / (at.r**0.5 if at.rslora else at.r)
                deltas[module] = deltas.get(module, 0) + scale * _widened(one.tensor).float()
        sites = [module for module in self.places if module in deltas]
        if not sites:
            return None
        biases = BitFitConfig(targets=self._targets(sites, METHODS["bitfit"].delta.kinds))
        return Member("biases", biases, None, {f"{PREFIX}{module}.delta": deltas[module] for module in sites})


def _by_end(given: Mapping[str, tuple[int, ...]], module: str) -> tuple[int, ...] | None:
    return next((ids for end, ids in given.items() if module.endswith(end)), None)


def _ends(model: Any, places: Mapping[str, Place]) -> list[str]:
    """The names of the input embeddings and the output head, where there are such."""
    getter = getattr(model, "get_input_embeddings", None)
    embeddings = getter() if getter else None
    embeddings = embeddings.base if isinstance(embeddings, LayerHost) else embeddings
    ends = [embeddings, output_head(model)]
    return [name for end in ends for name, place in places.items() if place.module is end]


def copied_rows(own: Tensor, copy: Tensor) -> Tensor:
    """For each row of a weight, whether `copy` is what storing it in another dtype leaves of it: bool [rows].

    Either may have been rounded to its dtype, or to a narrower one in between, from the same numbers x:

        |own - copy| <= (u + v) |x| + s + t      u, v: half of each eps;  s, t: half of each smallest number

    and a number above the greatest of the copy's dtype is infinity there.
    """
    blocks = zip(own.split(4096), copy.split(4096), strict=True)  # a table is large, and float32 twice as large
    return torch.cat([_copied(one, other) for one, other in blocks])


def _copied(own: Tensor, copy: Tensor) -> Tensor:
    wide, theirs = own.float(), copy.float()
    fits = torch.zeros(len(own), dtype=torch.bool, device=own.device)
    for here in _dtypes(own):
        for there in _dtypes(copy):
            same = wide == theirs
            if here != there:
                a, b = torch.finfo(here), torch.finfo(there)
                bound = 0.51 * ((a.eps + b.eps) * wide.abs() + a.smallest_normal * a.eps + b.smallest_normal * b.eps)
                above = wide.abs() >= b.max * (1 - b.eps)
                same |= ((wide - theirs).abs() <= bound) | (above & (theirs == wide.sign() * torch.inf))
            fits |= same.reshape(len(own), -1).all(1)
    return fits


def _dtypes(t: Tensor) -> set[torch.dtype]:
    """The dtypes that the numbers of a tensor may have been rounded to."""
    halves = (torch.float16, torch.bfloat16)
    return {t.dtype, *(dtype for dtype in halves if torch.equal(t.to(dtype).float(), t.float()))}
