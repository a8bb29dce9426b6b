"""Sites: every place in a model where a delta can sit, and which of them a config means."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from graftlm.config.schema import build, expression, to_tree
from graftlm.deltas import METHODS
from graftlm.deltas.base import DeltaConfig, Rows, Site, Targets, matches
from graftlm.deltas.inits import INITS
from graftlm.errors import TargetError, nearest
from graftlm.model import parts
from graftlm.model.bases import KINDS, view
from graftlm.model.hosts import Host, LayerHost
from graftlm.model.initialize import part_with
from graftlm.model.parts import indices
from graftlm.model.probing import bypassed
from graftlm.plugins import load_plugins

CHILD = "graft"
"""The name under which a host that works by hooks is a child of the module that it serves."""


@dataclass(frozen=True)
class Place:
    """A candidate: the module, and what kind of site it is."""

    module: nn.Module
    kind: str


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The part of a language model between ids and last hidden states; None for other models."""
    getter = getattr(model, "get_decoder", None)
    if getter is None:
        return None
    # Some classes answer with themselves or with their output layer (which ModernBERT calls `decoder`): the decoder is
    # then what transformers calls the base model, or what the class itself calls its model.
    for found in (getter(), getattr(model, "base_model", None), getattr(model, "model", None)):
        if isinstance(found, nn.Module) and found is not model and next(found.children(), None) is not None:
            return found
    return None


def places(model: nn.Module) -> dict[str, Place]:
    """Every place for a delta, by name, in the order of the model; a host counts as the layer that it holds."""
    found: dict[str, Place] = {}
    inside: list[str] = []  # a delta may have layers of its own, on which no other delta sits
    decoder = decoder_of(model)
    layers = _transformer_layers(model, decoder)
    for name, module in model.named_modules():
        if name.startswith(tuple(inside)):
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.append(f"{name}.")  # torch reads its layers' weights, and calls none of them
        elif isinstance(module, Host):
            inside.append(f"{name}.")
            if isinstance(module, LayerHost):
                found[name] = Place(module.base, module.view.kind)
        elif name == "graft_shared":
            inside.append(f"{name}.")
        elif (base := view(module)) is not None:
            found[name] = Place(module, base.kind)
        elif decoder is not None and module is decoder:
            found[name] = Place(decoder, "model")
        elif name in layers:
            found[name] = Place(module, "block")
        elif name.rpartition(".")[0] in layers and _has_linear(module):
            found[name] = Place(module, "sublayer")
    return found


def transformer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's layers by name, in order; none for a model without a decoder."""
    return {name: model.get_submodule(name) for name in _transformer_layers(model, decoder_of(model))}


def _transformer_layers(model: nn.Module, decoder: nn.Module | None) -> list[str]:
    """The names of the items of the decoder's outermost list of blocks, the longest of them (not of experts, which lie
    inside a block, and not of projections, which are no blocks)."""
    prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder), "")
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith(prefix) and _has_parts(module)
    }
    if decoder is None or not lists:
        return []
    name = max(lists, key=lambda key: (-key.count("."), len(lists[key])))
    return [f"{name}.{number}" for number in range(len(lists[name]))]


def _has_parts(blocks: nn.ModuleList) -> bool:
    items = (block.base if isinstance(block, LayerHost) else block for block in blocks)
    return any(next(item.children(), None) is not None for item in items)


def _has_linear(module: nn.Module) -> bool:
    layers = (m.base if isinstance(m, LayerHost) else m for m in module.modules())
    return any((base := view(layer)) is not None and base.kind == "linear" for layer in layers)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, or None for a model without one."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    return head.base if isinstance(head, LayerHost) else head


def towers(model: nn.Module) -> list[str]:
    """The names of what stands beside the decoder of a model of text and something else: text never reaches it."""
    config: Any = getattr(model, "config", None)
    decoder = decoder_of(model)
    if decoder is None or config is None or not hasattr(config, "get_text_config"):
        return []
    if config.get_text_config() is config or getattr(config, "is_encoder_decoder", False):
        return []
    around = {id(m) for m in model.modules() if any(inner is decoder for inner in m.modules())}
    head = output_head(model)
    names = (n for n, m in model.named_modules() if n and id(m) not in around and m is not head)
    within = tuple(f"{n}." for n, m in model.named_modules() if m is decoder)
    beside: list[str] = []
    for name in names:
        if not name.startswith((*within, *(f"{other}." for other in beside))):
            beside.append(name)
    return beside


def _is_attention(name: str) -> bool:
    return "attn" in name.rpartition(".")[2] or "attention" in name.rpartition(".")[2]


def find_sites(model: nn.Module, targets: Targets, kinds: Sequence[str] = ("linear", "embedding", "norm")) -> list[str]:
    """The names of the places of these kinds that `targets` means; raises TargetError for what matches none of them.

    Keywords: `all-linear` (the output head left out), `all-norms`, `all-embeddings`, `all` (these three),
    `all-attention`, `all-mlp`, `all-sublayers`, `all-blocks` and `model`. They mean the decoder of a model that also
    sees or hears. Another string: a regular expression for the whole name. A tuple: each entry the end of a name, from
    a dot on (the rules of PEFT, so that its adapters mean the same here). The name of a part of a fused projection is
    that of the layer and the part's (`c_attn.q`); it is meant where the layer is not.
    """
    layers = {name: place for name, place in places(model).items() if place.kind in kinds}
    if isinstance(targets, str) and targets in KEYWORDS:
        kinds_meant, head = KEYWORDS[targets], output_head(model)
        beside = tuple(f"{name}." for name in towers(model))
        found = [name for name, place in layers.items() if place.kind in kinds_meant and place.module is not head]
        found = [name for name in found if not f"{name}.".startswith(beside)]
        if targets in ("all-attention", "all-mlp"):
            found = [name for name in found if _is_attention(name) == (targets == "all-attention")]
        return found
    linear = [name for name, place in layers.items() if place.kind == "linear"]
    if isinstance(targets, str):
        pattern = _compiled(targets)
        whole = {name for name in layers if pattern.fullmatch(name)}
        # An end that any word would fit means what lies inside of modules, not parts of layers.
        open_ended = {name for name in linear if pattern.fullmatch(f"{name}.\0")}
        layers_and_parts = {
            name: at
            for name, at in parts.candidates(linear).items()
            if name not in layers and at[0] not in whole | open_ended and pattern.fullmatch(name)
        }
        rows = find_parts(model, layers_and_parts)
        if not whole and not rows:
            raise TargetError(
                f"targets: the regular expression {targets!r} matches no layer. {what_there_is(layers)}",
                code="no-layer-matches",
            )
    else:
        whole = {name for name in layers if matches(targets, name)}
        suffixes = tuple(suffix for suffix in targets if "." in suffix)
        candidates = {
            name: at for name, at in parts.candidates(linear).items() if name not in layers and matches(suffixes, name)
        }
        layers_and_parts = {name: at for name, at in candidates.items() if at[0] not in whole}
        for suffix in targets:
            if not any(matches((suffix,), name) for name in (*layers, *candidates)):
                raise _matches_nothing(model, suffix, layers, kinds)
        rows = find_parts(model, layers_and_parts)
        for name, (layer, _) in layers_and_parts.items():
            if name not in rows:
                raise TargetError(parts.why_not(model, name, layer, transformer_layers(model)), code="no-such-part")
    by_layer: dict[str, list[str]] = {}
    for name in rows:
        by_layer.setdefault(layers_and_parts[name][0], []).append(name)
    return [found for name in layers for found in ([name] if name in whole else by_layer.get(name, []))]


def _matches_nothing(model: nn.Module, suffix: str, layers: Mapping[str, Place], kinds: Sequence[str]) -> TargetError:
    others = [n for n, m in model.named_modules() if matches((suffix,), n)]
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        return TargetError(
            f"targets: {suffix!r} is a {kind} ({others[0]}); this delta can sit on {_kinds(kinds)}. "
            f"{what_there_is(layers)}",
            code="layer-of-other-kind",
        )
    near = nearest(suffix, [n.rpartition(".")[2] for n in layers])
    return TargetError(
        f"targets: {suffix!r} matches no layer. {near}\n{what_there_is(layers)}", code="no-layer-matches"
    )


def find_parts(model: nn.Module, places: Mapping[str, tuple[str, str]]) -> dict[str, Rows]:
    """The rows of parts of fused projections, name -> (layer, part), for those that are there."""
    return parts.find(model, places, transformer_layers(model)) if places else {}


def part_of(model: nn.Module, name: str) -> tuple[str, str] | None:
    """(layer, part) for a name that ends in a part of a layer, None for the name of a module."""
    layer, _, part = name.rpartition(".")
    if part not in parts.PARTS:
        return None
    try:
        model.get_submodule(name)
    except AttributeError:
        return layer, part
    return None


def not_called(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The sites whose weight the model's code uses without calling the layer."""
    layers = {name: (at[0] if (at := part_of(model, name)) else name) for name in names}
    used = set(bypassed(model, list(dict.fromkeys(layers.values())), transformer_layers(model)))
    return [name for name, layer in layers.items() if layer in used]


KEYWORDS = {
    "all-linear": ("linear",),
    "all-norms": ("norm",),
    "all-embeddings": ("embedding",),
    "all": ("linear", "norm", "embedding"),
    "all-attention": ("sublayer",),
    "all-mlp": ("sublayer",),
    "all-sublayers": ("sublayer",),
    "all-blocks": ("block",),
    "model": ("model",),
}


def _kinds(kinds: Sequence[str]) -> str:
    classes = {"linear": [k.__name__ for k in KINDS if "Embedding" not in k.__name__ and "Norm" not in k.__name__]}
    return ", ".join(name for kind in kinds for name in classes.get(kind, [f"a {kind}"]))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(expression(pattern))
    except ValueError as error:
        raise TargetError(f"{pattern!r}: {error}", code="invalid-pattern") from None


def what_there_is(layers: Mapping[str, Any]) -> str:
    """The kinds of name among the places, with how many there are of each: the list a user needs to mend targets."""
    counts: dict[str, int] = {}
    for name in layers:
        generic = re.sub(r"\.\d+\.", ".*.", name)
        counts[generic] = counts.get(generic, 0) + 1
    if not counts:
        return "This model has no place of such a kind"
    return "This model has: " + ", ".join(f"{name} ({n})" for name, n in counts.items())


def config_at(config: DeltaConfig, name: str) -> DeltaConfig:
    """The config for one site: the fields of the first pattern that matches the end of its name are replaced."""
    for pattern, overrides in config.patterns.items():
        if pattern_matches(pattern, name):
            return build(type(config), to_tree(config) | dict(overrides), source=f"patterns: {pattern!r}")
    return config


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a regular expression is the end of a name, from a dot on, or all of it."""
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    return any(re.compile(pattern).fullmatch(name, start) for start in starts)


def check_patterns(config: DeltaConfig, sites: Sequence[str]) -> None:
    allowed = {f.name for f in fields(config)} - {"method", "init", "targets", "patterns"}
    if type(config).share is not DeltaConfig.share:
        allowed &= {"dropout"}  # what sites share has one size
    for pattern, overrides in config.patterns.items():
        _compiled(pattern)
        if not any(pattern_matches(pattern, name) for name in sites):
            raise TargetError(
                f"patterns: {pattern!r} matches none of the {len(sites)} sites, such as {sites[0]}",
                code="no-site-matches",
            )
        for key in overrides:
            if key not in allowed:
                raise TargetError(
                    f"patterns: {pattern!r} sets {key!r}, which no pattern can. {nearest(key, allowed)}",
                    code="unknown-pattern-key",
                )


def site_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def layer_number(name: str) -> int | None:
    """The transformer layer that a name lies in: the first number in it."""
    number = re.search(r"\.(\d+)(\.|$)", name)
    return int(number[1]) if number else None


Statistics = Mapping[str, Mapping[str, Tensor]]
"""Site -> what was gathered there: see graftlm/passes/statistics.py."""


def sites_of(
    model: nn.Module, config: DeltaConfig, *, seed: int = 0, statistics: Statistics | None = None
) -> list[Site]:
    """The sites that a config means on this model, in the model's order; TargetError where there is none."""
    load_plugins("graftlm.methods")
    if config.init not in INITS:
        raise TargetError(f"init: {config.init!r} is unknown. {nearest(config.init, INITS)}", code="unknown-init")
    names = find_sites(model, config.targets, METHODS[config.method].delta.kinds)
    if unused := not_called(model, names):
        if config.targets not in KEYWORDS:
            raise TargetError(
                f"targets: {len(unused)} layers, such as {unused[0]}, are never called: {type(model).__name__}'s code "
                "multiplies with their weight by itself, so a delta there would act in part or not at all. Leave "
                f"{', '.join(dict.fromkeys(repr(n.rpartition('.')[2]) for n in unused))} out",
                code="layers-never-called",
            )
        names = [name for name in names if name not in unused]
    sites = config.select([site_at(model, name, seed, statistics or {}) for name in names])
    if not sites:
        kinds = " or ".join(METHODS[config.method].delta.kinds)
        raise TargetError(
            f"targets: {config.targets!r} matches no {kinds} of this model for {config.method!r}"
            f"{_quantized_by_others(model)}",
            code="no-layer-matches",
        )
    check_patterns(config, [site.name for site in sites])
    if config.dropout and all(site.kind in ("embedding", "model") for site in sites):
        raise TargetError(
            "dropout: a delta on embeddings or on the model sees no x whose elements could be dropped",
            code="dropout-without-input",
        )
    _check_init(sites[0], config)
    return list(sites)


def _quantized_by_others(model: nn.Module) -> str:
    if getattr(getattr(model, "config", None), "quantization_config", None) is None:
        return ""
    odd = next((m for m in model.modules() if isinstance(m, nn.Linear) and view(m) is None), None)
    layers = "" if odd is None else f", in layers such as {type(odd).__name__}"
    return (
        f": its weights were quantized by another library{layers}. Load the model that it was made of, with "
        "quantization nf4, int4 or int8"
    )


def _check_init(site: Site, config: DeltaConfig) -> None:
    """Refuse an init that the method does not admit, before anything is gathered or computed for it."""
    if INITS[config.init].tensors:
        there = replace(site, shared=config.share([site]))
        part_with(
            METHODS[config.method].delta(there, config_at(config, site.name)), INITS[config.init].tensors, config.init
        )


def site_at(model: nn.Module, name: str, seed: int, statistics: Statistics) -> Site:
    if (at := part_of(model, name)) is not None:
        return _part(site_at(model, at[0], seed, {}), name, find_parts(model, {name: at})[name], seed, statistics)
    module = model.get_submodule(name)
    layer = module.base if isinstance(module, LayerHost) else module
    facts: dict[str, Any] = {
        "seed": site_seed(seed, name),
        "layer": layer_number(name),
        "statistics": statistics.get(name, {}),
    }
    if (base := view(layer)) is not None:
        head = output_head(model)
        facts |= {
            "bias": lambda: base.bias,
            "original": base.original,
            "has_bias": base.stored_bias is not None,
            "kind": base.kind,
            "tied": base.kind == "embedding" and head is not None and head.weight is layer.weight,
        }
        return Site(name, base.d_in, base.d_out, lambda: base.weight, **facts)
    settings: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    d = settings.hidden_size
    if module is not decoder_of(model):
        kind = "block" if name in transformer_layers(model) else "sublayer"
        return Site(name, d, d, lambda: None, **{**facts, "kind": kind})
    embeddings: Any = module.get_input_embeddings()  # type: ignore[operator]
    table = view(embeddings.base if isinstance(embeddings, LayerHost) else embeddings)
    groups = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
    size = getattr(settings, "head_dim", None) or d // settings.num_attention_heads
    return Site(
        name,
        table.d_in if table else settings.vocab_size,
        d,
        lambda: table.weight if table else None,
        kind="model",
        heads=(settings.num_hidden_layers, groups, size),
        **facts,
    )


def _part(layer: Site, name: str, rows: Rows, seed: int, statistics: Statistics) -> Site:
    """The site of some rows of a layer: a layer of its own, as far as a method sees."""

    def those(t: Tensor) -> Tensor:
        return t[indices(site, t)]

    def bias() -> Tensor | None:
        return None if (b := layer.bias()) is None else those(b)

    site = replace(
        layer,
        name=name,
        d_out=sum(stop - start for start, stop in rows),
        weight=lambda: those(layer.W()),
        bias=bias,
        original=lambda: those(layer.original()),
        seed=site_seed(seed, name),
        rows=rows,
        statistics=statistics.get(name, {}),
    )
    return site
