"""Surgery: put deltas on their sites, switch them on and off, take them away again, fold them into weights.

Attaching changes the model in place and no weight of it; with no delta on, the model is its base bit for bit.
"""

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.deltas import METHODS
from graftlm.deltas.base import AdditiveDelta, Delta, DeltaConfig, InputDelta, Rows, Site, Targets, WeightDelta
from graftlm.deltas.inits import INITS
from graftlm.errors import TargetError, nearest
from graftlm.model.layers import prefix
from graftlm.model.layers.bases import view
from graftlm.model.layers.hosts import Host, LayerHost, ModelHost, Row, SubLayerHost, Switch
from graftlm.model.layers.parts import expanded, indices, together
from graftlm.model.layers.quantize import QuantisedLinear
from graftlm.model.layers.sites import (
    CHILD,
    KEYWORDS,
    check_patterns,
    config_at,
    decoder_of,
    find_parts,
    find_sites,
    layer_number,
    not_called,
    output_head,
    part_of,
    site_seed,
)
from graftlm.plugins import load_plugins

SHARED = "graft_shared"
ROUNDING = 1e-6
"""Share of the sum of absolute products up to which B A counts as zero: what float32 leaves of one that cancels."""
Statistics = Mapping[str, Mapping[str, Tensor]]
"""Site -> what was gathered there: see graftlm/model/passes/statistics.py."""


@dataclass(frozen=True)
class Chat:
    """How the conversations of an adapter were rendered when it was trained."""

    template: str
    """The source of the chat template."""
    today: datetime.date | None = None
    """The day of the run, where the template writes the date."""
    turn_order: Literal["refuse", "merge", "drop"] = "refuse"
    """`data.turn_order` of the run: what becomes of a system message that the template has no place for."""


@dataclass
class Attachment:
    """What a model with deltas remembers: the config of each, and which parameters were trainable before the first."""

    configs: dict[str, DeltaConfig] = field(default_factory=dict)
    sites: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    chats: dict[str, Chat] = field(default_factory=dict)
    """Of each that was trained, or loaded, with a chat template."""
    tokenizers: dict[str, Any] = field(default_factory=dict)
    """The tokenizer of each that was loaded with one."""
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name of an adapter that is several deltas -> their names, in the order in which they act: what is done to the
    adapter is done to all of them."""
    trainable_before: set[str] = field(default_factory=set)
    kernel_before: str | None = None
    switch: Switch = field(default_factory=Switch)


def attachment(model: nn.Module) -> Attachment:
    """The model's record of its deltas; an empty one where it has none."""
    kept = getattr(model, "graft_attachment", None)
    return kept if isinstance(kept, Attachment) else Attachment()


def hosts(model: nn.Module) -> dict[str, Host]:
    """Every host by the name of its site, which is the name that the layer or sub-layer has in the base."""
    return {_site_name(name): module for name, module in model.named_modules() if isinstance(module, Host)}


def deltas_by_site(model: nn.Module) -> Iterator[tuple[str, str, Delta]]:
    """(name of the delta, name of the site, the delta there) in the model's order, each part of a layer by itself."""
    for site, host in hosts(model).items():
        for name, delta in host.deltas.items():
            for where, part in expanded(site, delta):
                yield name, where, part


def _site_name(name: str) -> str:
    return name.removesuffix(f".{CHILD}")


def shared_of(model: nn.Module, name: str) -> nn.Module | None:
    """What the sites of a delta hold in common, or None."""
    everything = getattr(model, SHARED, None)
    return everything[name] if everything is not None and name in everything else None


def share(model: nn.Module, name: str, module: nn.Module) -> None:
    """Keep a module at the model's root, among what sites have in common: none of it belongs to the base."""
    if not hasattr(model, SHARED):
        model.add_module(SHARED, nn.ModuleDict())
    module = module.to(next(model.parameters()).device).train(model.training)
    model.get_submodule(SHARED).add_module(name, module)


# Attaching and detaching -----------------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    config: DeltaConfig,
    *,
    targets: Targets | None = None,
    name: str = "default",
    seed: int = 0,
    statistics: Statistics | None = None,
    start: bool = True,
) -> nn.Module:
    """Freeze `model` and put a delta on every site of `targets` (default: the config's own); active at once.

    The model is changed in place, and returned. `seed` gives every site its own random start, the same in each run.
    `statistics` (`collect`) are needed by some inits and methods. `start=False` leaves out what a file will fill.
    Raises TargetError for targets or patterns that match nothing, for a name that is taken and for an init that the
    method does not admit; RecipeError for a value in a pattern that is out of range. The model is then as it was.
    """
    if targets is not None:
        config = replace(config, targets=targets if isinstance(targets, str) else tuple(targets))
    record = attachment(model)
    if name in record.configs:
        raise TargetError(f"there is a delta {name!r} on this model already: detach it first, or give another name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", name):
        raise TargetError(
            f"{name!r} cannot name a delta: use letters, digits, - and _, beginning with a letter or digit"
        )
    if hasattr(nn.ModuleDict, name):  # where deltas are held
        raise TargetError(f"{name!r} cannot name a delta: torch's ModuleDict has a method of that name")
    _check_model(model)
    places = sites_of(model, config, seed=seed, statistics=statistics)
    _check_statistics(config, places, start)
    shared = config.share(places)
    places = [replace(site, shared=shared) for site in places]
    # all of them before the model is touched
    deltas = _by_layer(model, config, {site.name: _new_delta(model, site, config, start) for site in places}, seed)
    if not record.configs:
        record.trainable_before = {n for n, p in model.named_parameters() if p.requires_grad}
        model.requires_grad_(False)
        model.graft_attachment = record  # type: ignore[assignment]
        for module in model.modules():
            if hasattr(module, "save_pretrained"):
                vars(module)["save_pretrained"] = _no_save_pretrained
    for site_name, delta in deltas.items():
        host = _host_at(model, site_name, delta.site, record)
        host.deltas[name] = delta.train(host.training)  # a new module is in training mode, with dropout on
        host.active = (*host.active, name)
    if shared is not None:
        share(model, name, shared)
    record.configs[name] = config
    record.sites[name] = tuple(site.name for site in places)
    record.seeds[name] = seed
    return model


def _by_layer(model: nn.Module, config: DeltaConfig, deltas: dict[str, Delta], seed: int) -> dict[str, Delta]:
    """Layer -> delta, where the deltas of a layer's parts are one."""
    made: dict[str, Delta] = {}
    of_parts: dict[str, dict[str, Delta]] = {}
    for name, delta in deltas.items():
        if delta.site.rows is None:
            made[name] = delta
            continue
        layer, _, part = name.rpartition(".")
        of_parts.setdefault(layer, {})[part] = delta
        made[layer] = delta  # to be replaced: the order is the model's
    for layer, parts in of_parts.items():
        site = replace(_site(model, layer, seed, {}), shared=next(iter(parts.values())).site.shared)
        made[layer] = together(site, config, parts).to(next(model.parameters()).device)
    return made


def _check_model(model: nn.Module) -> None:
    """Refuse a model on which a delta would be wrong: one with another library's adapters, or without its weights."""
    theirs = next((m for m in model.modules() if type(m).__module__.startswith("peft.")), None)
    if theirs is not None:
        raise TargetError(
            f"this model has adapters of PEFT on it ({type(theirs).__name__}), and deltas would sit on their parts. "
            "Take them off (`model = model.unload()`), or fold them in (`model = model.merge_and_unload()`), and "
            "attach to what that returns. A saved adapter of PEFT loads with graftlm.load_adapter(base, folder)"
        )
    if not getattr(model, SKETCH, False) and (why := absent_weights(model)):
        raise TargetError(why)


def absent_weights(model: nn.Module) -> str:
    """The error message for a model whose weights are not all in memory; empty if they are."""
    absent = [name for name, p in model.named_parameters() if p.is_meta]
    if not absent:
        return ""
    return (
        f"{len(absent)} weights are not in memory, the first is {absent[0]}: accelerate keeps them on disk or on the "
        "CPU and brings them when a layer runs, and a delta needs them where it computes. Load the model whole "
        "(without device_map), in fewer bits if it does not fit (load_base(..., store='nf4'))"
    )


SKETCH = "graft_sketch"
"""The attribute of a model that is there to be planned with: most of its weights are meant to be absent."""


def _no_save_pretrained(*args: Any, **kwargs: Any) -> None:
    """Stands on a model with deltas: its tensors have other names there, and loading would make them anew at random."""
    raise TargetError(
        "save_pretrained: this model has deltas on it, and their layers have other names than transformers knows, so "
        "what it wrote could not be loaded. Write the deltas with graftlm.save_adapter(model, folder), the base with "
        "the deltas folded in with adapters.export.export.merge_into(model, folder), or take them off (graftlm.detach)"
    )


def sites_of(
    model: nn.Module, config: DeltaConfig, *, seed: int = 0, statistics: Statistics | None = None
) -> list[Site]:
    """The sites that a config means on this model, in the model's order; TargetError where there is none."""
    load_plugins("graftlm.methods")
    if config.init not in INITS:
        raise TargetError(f"init: {config.init!r} is unknown. {nearest(config.init, INITS)}")
    names = find_sites(model, config.targets, METHODS[config.method].delta.kinds)
    if unused := not_called(model, names):
        if config.targets not in KEYWORDS:
            raise TargetError(
                f"targets: {len(unused)} layers, such as {unused[0]}, are never called: {type(model).__name__}'s code "
                "multiplies with their weight by itself, so a delta there would act in part or not at all. Leave "
                f"{', '.join(dict.fromkeys(repr(n.rpartition('.')[2]) for n in unused))} out"
            )
        names = [name for name in names if name not in unused]
    chosen = config.select([_site(model, name, seed, statistics or {}) for name in names])
    if not chosen:
        kinds = " or ".join(METHODS[config.method].delta.kinds)
        raise TargetError(
            f"targets: {config.targets!r} matches no {kinds} of this model for {config.method!r}"
            f"{_codes_of_others(model)}"
        )
    check_patterns(config, [site.name for site in chosen])
    if config.dropout and all(site.kind in ("embedding", "model") for site in chosen):
        raise TargetError("dropout: a delta on embeddings or on the model sees no x whose elements could be dropped")
    _check_init(chosen[0], config)
    return list(chosen)


def _codes_of_others(model: nn.Module) -> str:
    if getattr(getattr(model, "config", None), "quantization_config", None) is None:
        return ""
    odd = next((m for m in model.modules() if isinstance(m, nn.Linear) and view(m) is None), None)
    layers = "" if odd is None else f", in layers such as {type(odd).__name__}"
    return (
        f": its weights were quantised by another library{layers}. Load the model that it was made of, with store nf4, "
        "int4 or int8"
    )


def _check_init(site: Site, config: DeltaConfig) -> None:
    """Refuse an init that the method does not admit, before anything is gathered or computed for it."""
    if INITS[config.init].tensors:
        there = replace(site, shared=config.share([site]))
        _part_with(
            METHODS[config.method].delta(there, config_at(config, site.name)), INITS[config.init].tensors, config.init
        )


def _site(model: nn.Module, name: str, seed: int, statistics: Statistics) -> Site:
    if (at := part_of(model, name)) is not None:
        return _part(_site(model, at[0], seed, {}), name, find_parts(model, {name: at})[name], seed, statistics)
    module = model.get_submodule(name)
    layer = module.base if isinstance(module, LayerHost) else module
    seen: dict[str, Any] = {
        "seed": site_seed(seed, name),
        "layer": layer_number(name),
        "statistics": statistics.get(name, {}),
    }
    if (base := view(layer)) is not None:
        head = output_head(model)
        seen |= {
            "bias": lambda: base.bias,
            "original": base.original,
            "has_bias": base.stored_bias is not None,
            "kind": base.kind,
            "tied": base.kind == "embedding" and head is not None and head.weight is layer.weight,
        }
        return Site(name, base.d_in, base.d_out, lambda: base.weight, **seen)
    settings: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    d = settings.hidden_size
    if module is not decoder_of(model):
        return Site(name, d, d, lambda: None, kind="sublayer", **seen)
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
        **seen,
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


def _check_statistics(config: DeltaConfig, sites: Sequence[Site], start: bool) -> None:
    wanted = needed_statistics(config) if start else ()
    for what in wanted:
        lacking = [site.name for site in sites if what not in site.statistics]
        if lacking:
            raise TargetError(
                f"{config.method} with init {config.init!r} starts from the {what} of each layer, which "
                f"{len(lacking)} of {len(sites)} sites lack: give `statistics=collect(...)` "
                "(`graft train` gathers them from the training rows by itself)"
            )


def needed_statistics(config: DeltaConfig) -> tuple[str, ...]:
    """What a delta with this config wants to know of the data before it starts: gradient, fisher, second_moment."""
    load_plugins("graftlm.methods")
    return tuple(dict.fromkeys((*METHODS[config.method].delta.needs, *INITS[config.init].needs)))


@torch.no_grad()
def _new_delta(model: nn.Module, site: Site, config: DeltaConfig, start: bool) -> Delta:
    delta = METHODS[config.method].delta(site, config_at(config, site.name))
    if start:
        delta.start()
        _initialise(site, delta, config.init)
    return delta.to(next(model.parameters()).device)


def _initialise(site: Site, delta: Delta, name: str) -> None:
    """Lay the init's tensors over the delta's own; where dW is then not zero, record an offset that makes it so."""
    init = INITS[name]
    if init.tensors:
        part = _part_with(delta, init.tensors, name)
        try:
            values = init.make(site, part)
        except TargetError as error:
            raise TargetError(f"init: {name!r} at {site.name}: {error}") from None
        for key, value in values.items():
            own = part.get_parameter(key) if key in dict(part.named_parameters(recurse=False)) else part.get_buffer(key)
            if own.shape != value.shape:
                raise TargetError(
                    f"init {name!r} does not fit {delta.config.method!r} at {site.name}: {key} is {list(own.shape)}, "
                    f"the init makes {list(value.shape)}"
                )
            own.copy_(value)
        factors = part.factors() if isinstance(part, AdditiveDelta) else None
        splits = init.tensors == ("A", "B") and "B" in values
        if factors is not None and splits and not _is_product(part, *factors):
            raise TargetError(
                f"init: {name!r} starts from a B A of its own; {delta.config.method!r} has another product, so it "
                "would start from something else. `init: zero` is the method's own start"
            )
        if init.starts_at_base:
            _keep_the_base(site, delta, factors, name)


def _keep_the_base(site: Site, delta: Delta, factors: tuple[Tensor, Tensor] | None, name: str) -> None:
    """Record the offset with which the fresh delta is the base again; refuse an init for which there is none."""
    if factors is not None:
        A, B = (factor.detach().clone() for factor in factors)
        if float((B @ A).abs().max()) <= ROUNDING * float((B.abs() @ A.abs()).max()):
            return
        if isinstance(delta, WeightDelta):
            delta.offset_A, delta.offset_B = A, B
            return
    elif isinstance(delta, WeightDelta):
        W, b = site.W().cpu(), torch.zeros(site.d_out) if site.has_bias else None
        changed, shift = delta.effective(W, b)
        if torch.allclose(changed, W, atol=ROUNDING * float(W.abs().max())) and (shift is None or not shift.any()):
            return
    raise TargetError(
        f"init: {name!r} would move the model: what {delta.config.method!r} adds to W is no fixed B A, "
        "so it cannot be taken out of W beforehand. `init: zero` is the method's own start"
    )


def _is_product(part: Delta, A: Tensor, B: Tensor) -> bool:
    """Whether the factors of a delta are its own tensors A and s B."""
    own = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    pairs = ((A, own["A"]), (B, part.scale * own["B"]))
    return all(made.shape == tensor.shape and torch.allclose(made, tensor) for made, tensor in pairs)


def _part_with(delta: Delta, tensors: Sequence[str], name: str) -> Delta:
    """The delta itself or the one inside of it that has all these tensors: what an init starts."""
    having = [
        part
        for part in delta.modules()
        if isinstance(part, Delta) and all(isinstance(getattr(part, key, None), Tensor) for key in tensors)
    ]
    if len(having) == 1:
        return having[0]
    own = ", ".join(sorted(key for key, _ in delta.named_parameters())) or "nothing"
    raise TargetError(
        f"init: {name!r} sets {' and '.join(tensors)} of one low-rank product; {delta.config.method!r} has "
        f"{'several' if having else own}, so the pair has no meaning. `init: zero` is the method's own start"
    )


def _host_at(model: nn.Module, name: str, site: Site, record: Attachment) -> Host:
    module = model.get_submodule(name)
    if isinstance(module, LayerHost):
        return module
    if site.kind not in ("sublayer", "model"):
        layer_host = LayerHost(module, record.switch).train(module.training)
        _replace(model, name, layer_host)
        return layer_host
    there = getattr(module, CHILD, None)
    if isinstance(there, Host):
        return there
    if site.kind == "sublayer":
        host: Host = SubLayerHost(module, site.d_in, record.switch)
    else:
        host = ModelHost(module, site.d_out, record.switch)
        _use_prefix_kernel(model, module, host, record)
    module.add_module(CHILD, host.train(module.training))
    return host


def _use_prefix_kernel(model: Any, decoder: nn.Module, host: ModelHost, record: Attachment) -> None:
    kernel, layers = model.config._attn_implementation, prefix.attention_layers(decoder)
    if kernel != "sdpa" or len(layers) != model.config.get_text_config().num_hidden_layers:
        raise TargetError(
            f"{type(model).__name__}: prefix and prompt need a model whose {model.config.num_hidden_layers} layers "
            f"attend through transformers' interface with sdpa; this has {len(layers)} such layers and runs {kernel!r}"
        )
    record.kernel_before = kernel
    model.config._attn_implementation = prefix.NAME
    for layer in layers:
        layer.__dict__["graft_before"] = host


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _remove_host(model: Any, name: str, host: Host, record: Attachment) -> None:
    if isinstance(host, LayerHost):
        _replace(model, name, host.base)
        return
    module = model.get_submodule(name)
    assert isinstance(host, SubLayerHost | ModelHost)
    host.hook.remove()
    delattr(module, CHILD)
    if isinstance(host, ModelHost):
        model.config._attn_implementation = record.kernel_before
        for layer in prefix.attention_layers(module):
            del layer.__dict__["graft_before"]


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take a delta (default: all) off again; where a host is left empty, the very module that it held comes back.

    Returns the model. Raises TargetError for a name that no delta has.
    """
    record = attachment(model)
    for gone in _named(model, [name]) if name is not None else list(record.configs):
        for site_name, host in hosts(model).items():
            if gone in host.deltas:
                del host.deltas[gone]
                host.active = tuple(n for n in host.active if n != gone)
            if not host.deltas:
                _remove_host(model, site_name, host, record)
        if shared_of(model, gone) is not None:
            delattr(model.get_submodule(SHARED), gone)
            if not len(list(model.get_submodule(SHARED).children())):
                delattr(model, SHARED)
        del record.configs[gone], record.sites[gone], record.seeds[gone]
        record.chats.pop(gone, None)
        record.tokenizers.pop(gone, None)
        left = {key: tuple(other for other in names if other != gone) for key, names in record.members.items()}
        record.members = {key: names for key, names in left.items() if key != gone}
    if not record.configs:
        for module in model.modules():
            vars(module).pop("save_pretrained", None)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in record.trainable_before)
    return model


def _named(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The deltas that are meant, all of an adapter that is several; TargetError for a name that is none."""
    record = attachment(model)
    for name in names:
        if name not in record.configs:
            raise TargetError(f"no delta {name!r} on this model. {nearest(name, record.configs)}")
    return tuple(dict.fromkeys(each for name in names for each in record.members.get(name, (name,))))


def activate(model: nn.Module, *names: str) -> None:
    """Switch on exactly these deltas, in this order; none for the bare base.

    Returns nothing. Raises TargetError for a name that no delta has; the model is then as it was.
    """
    names = _named(model, names)
    for host in hosts(model).values():
        host.active = tuple(n for n in names if n in host.deltas)


def deltas_off(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Inside, the model is its base, bit for bit; afterwards the same deltas are active as before.

    Returns a context that yields the model. Raises nothing.
    """
    return deltas_only(model)


@contextmanager
def deltas_only(model: nn.Module, *names: str) -> Iterator[nn.Module]:
    """Inside, exactly these deltas are active, in this order; afterwards the same ones as before."""
    names = _named(model, names)
    found = list(hosts(model).values())
    before = [host.active for host in found]
    for host in found:
        host.active = tuple(n for n in names if n in host.deltas)
    try:
        yield model
    finally:
        for host, active in zip(found, before, strict=True):
            host.active = active


@contextmanager
def deltas_still(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the deltas are as they are used, without dropout; afterwards each is in the mode that it was in."""
    before = [(delta, delta.training) for host in hosts(model).values() for delta in host.deltas.values()]
    for delta, _ in before:
        delta.eval()
    try:
        yield model
    finally:
        for delta, training in before:
            delta.train(training)


@contextmanager
def by_row(model: nn.Module, rows: Sequence[Sequence[str] | Row]) -> Iterator[nn.Module]:
    """Inside, each row of a batch has the deltas that `rows` names for it, in that order; () is the bare base.

    A row may be a mapping from deltas to weights: {"a": 0.3} makes three tenths of the change that `a` makes, as
    `combine.merge` would. Generation repeats a row for its beams and for several answers, which have the row's deltas.
    Yields the model. Raises TargetError for a delta that is not on the model, a weight on a prefix or prompt, which are
    there or not, and a batch that is no multiple of the rows.
    """
    wanted = [_weighted(model, row) for row in rows]
    _check_rows(model, wanted)
    switch = attachment(model).switch
    before, switch.rows = switch.rows, wanted
    passes, switch.passes = switch.passes, []
    decoder = decoder_of(model)
    with ExitStack() as stack:
        for module in [model] if decoder is None else [model, decoder]:
            hook = module.register_forward_pre_hook(partial(_begin, switch), with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(module.register_forward_hook(lambda *_: switch.end(), always_call=True).remove)
        try:
            yield model
        finally:
            switch.rows, switch.passes = before, passes


def _weighted(model: nn.Module, row: Sequence[str] | Row) -> Row:
    """Delta -> its weight in a row, in order; all parts of an adapter have the weight that its name has."""
    weights = row if isinstance(row, Mapping) else dict.fromkeys(row, 1.0)
    return {part: weight for name, weight in weights.items() for part in _named(model, [name])}


def _check_rows(model: nn.Module, rows: Sequence[Row]) -> None:
    differ = {name for row in rows for name, weight in row.items() if any(other.get(name) != weight for other in rows)}
    for name, site, delta in deltas_by_site(model):
        if isinstance(delta, InputDelta) and any(row.get(name, 1) not in (0, 1) for row in rows):
            raise TargetError(f"{name!r} is a {delta.config.method}: it is there or not, so its weight is 0 or 1")
        if name in differ and "experts" in site.split("."):
            raise TargetError(
                f"{site}: which tokens reach an expert is its router's choice, so it cannot be told which belong to "
                f"which row. Run the rows one by one, or give all of them {name!r}"
            )


def _begin(switch: Switch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids"))]
    switch.begin(next((t for t in given if isinstance(t, Tensor) and t.dim() >= 2), None))


# Reading weights out ---------------------------------------------------------------------------------------------


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameters_of(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that one delta trains, or an adapter that is several; what their sites share included."""
    modules: list[nn.Module] = []
    for each in attachment(model).members.get(name, (name,)):
        modules += [host.deltas[each] for host in hosts(model).values() if each in host.deltas]
        shared = shared_of(model, each)
        modules += [] if shared is None else [shared]
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def penalty(model: nn.Module) -> Tensor | None:
    """What the active deltas add to the loss (`Delta.penalty`), summed over their sites; None where none does."""
    parts = [p for host in hosts(model).values() for delta in host.on() if (p := delta.penalty()) is not None]
    return torch.stack(parts).sum() if parts else None


def _ours(model: nn.Module) -> set[str]:
    """The beginnings of the names of all tensors in the model that do not belong to the base."""
    names = {f"{name}.deltas." for name, module in model.named_modules() if isinstance(module, Host)}
    return names | {f"{SHARED}."}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen base's own parameters by the names that they have without any host; tied ones once."""
    found, ours = hosts(model), tuple(_ours(model))
    return {_without_host(name, found): p for name, p in model.named_parameters() if not name.startswith(ours)}


def merged_state(model: nn.Module, *, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    """Return the state dict of the base with the active deltas folded in: new tensors under the base's own names.

    `dtype=None` keeps the base's own. Nothing in the model is changed. Tensors that share memory in the model (a tied
    head) share it here too, unless a delta sits on one of them. Raises TargetError where an active delta is no change
    of weights, or would need a bias where the layer can have none.
    """
    found, ours = hosts(model), tuple(_ours(model))
    changed: dict[str, Tensor | None] = {}
    with torch.no_grad():
        for name, host in found.items():
            if host.active and isinstance(host, LayerHost):
                W, b = host.effective()
                to = dtype or host.view.dtype
                # A delta may return the base's own W or b: a copy, so that whoever edits the state edits no model.
                kept = host.view.store(W)
                changed[f"{name}.weight"] = kept.to(to, copy=True, memory_format=torch.contiguous_format)
                changed[f"{name}.bias"] = None if b is None else b.to(to, copy=True)
            elif host.active:
                delta = host.on()[0]
                raise TargetError(
                    f"delta {host.active[0]!r} ({type(delta).__name__}) cannot be merged: {delta.not_mergeable}"
                )
        state: dict[str, Tensor] = {}
        converted: dict[tuple[int, torch.Size], Tensor] = {}
        coded = {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}
        codes = {f"{name}.{key}" for name, layer in coded.items() for key in layer.stored()}
        for key, tensor in model.state_dict().items():
            if key.startswith(ours) or key in codes:
                continue
            name = _without_host(key, found)
            if (new := changed.pop(name, None)) is not None:
                state[name] = new
                continue
            identity = (tensor.data_ptr(), tensor.shape)
            if identity not in converted:
                to = dtype or tensor.dtype
                converted[identity] = tensor.to(to, copy=True) if tensor.is_floating_point() else tensor.clone()
            state[name] = converted[identity]
        for key, layer in coded.items():
            name = _without_host(f"{key}.weight", found)
            if name not in changed:
                W = layer.dequantised(dtype or layer.dtype)
                state[name] = W.T.contiguous() if layer.transposed else W
        # What has no tensor of its name in the base: a bias that is new, and the weight of a layer that holds codes.
        state.update({name: tensor for name, tensor in changed.items() if tensor is not None})
    return state


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the frozen base as it is kept, codes included, under its own names; no copies."""
    found, ours = hosts(model), tuple(_ours(model))
    return {_without_host(key, found): t for key, t in model.state_dict().items() if not key.startswith(ours)}


def _without_host(key: str, found: Mapping[str, Host]) -> str:
    site, dot, rest = key.rpartition(".base.")
    return f"{site}.{rest}" if dot and site in found else key
