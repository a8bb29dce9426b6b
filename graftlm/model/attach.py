"""Surgery: put deltas on their sites, and take them away again.

Attaching changes the model in place and no weight of it; with no delta on, the model is its base bit for bit.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from graftlm.deltas import METHODS
from graftlm.deltas.base import Delta, DeltaConfig, Site, Targets
from graftlm.errors import TargetError
from graftlm.model import prefix
from graftlm.model.hosts import Host, LayerHost, ModelHost, SubLayerHost
from graftlm.model.initialize import initialize, needed_statistics
from graftlm.model.parts import together
from graftlm.model.registry import (
    SHARED,
    Attachment,
    attachment,
    delta_names,
    forget,
    hosts,
    known_hosts,
    share,
    shared_of,
)
from graftlm.model.sites import (
    CHILD,
    Statistics,
    config_at,
    site_at,
    sites_of,
)

SKETCH = "graft_sketch"
"""The attribute of a model that is there to be planned with: most of its weights are meant to be absent."""


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
    check_name(record, name)
    new = new_deltas(model, config, seed=seed, statistics=statistics, start=start)  # all, before the model is touched
    begin(model, record)
    for site_name, delta in new.deltas.items():
        host = host_at(model, replace(delta.site, name=site_name), record)
        host.deltas[name] = delta.train(host.training)  # a new module is in training mode, with dropout on
        host.active = (*host.active, name)
    if new.shared is not None:
        share(model, name, new.shared)
    record.configs[name] = config
    record.sites[name] = new.sites
    record.seeds[name] = seed
    came(record, name)
    return model


class NewDeltas(NamedTuple):
    """The deltas of a config for a model, not attached to it."""

    deltas: dict[str, Delta]
    """Layer, or other host -> delta."""
    sites: tuple[str, ...]
    shared: Any
    """What the sites hold in common (`Shared`), or None."""


def new_deltas(
    model: nn.Module,
    config: DeltaConfig,
    *,
    seed: int = 0,
    statistics: Statistics | None = None,
    start: bool = True,
) -> NewDeltas:
    """What `attach` puts on a model, and raises as it does; the model is not touched."""
    check_model(model)
    places = sites_of(model, config, seed=seed, statistics=statistics)
    _check_statistics(config, places, start)
    shared = config.share(places)
    places = [replace(site, shared=shared) for site in places]
    deltas = _by_layer(model, config, {site.name: _new_delta(model, site, config, start) for site in places}, seed)
    return NewDeltas(deltas, tuple(site.name for site in places), shared)


def check_name(record: Attachment, name: str) -> None:
    """Raise TargetError for a name that is taken, or that none can have."""
    if name in record.configs or name in record.factors:
        raise TargetError(
            f"there is a delta {name!r} on this model already: detach it first, or give another name", code="name-taken"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", name):
        raise TargetError(
            f"{name!r} cannot name a delta: use letters, digits, - and _, beginning with a letter or digit",
            code="invalid-name",
        )
    if hasattr(nn.ModuleDict, name):  # where deltas are held
        raise TargetError(
            f"{name!r} cannot name a delta: torch's ModuleDict has a method of that name", code="invalid-name"
        )


def begin(model: nn.Module, record: Attachment) -> None:
    """Freeze a model that has no deltas yet, and give it the record of those that come."""
    if record.frozen:
        return
    record.frozen = True
    record.trainable_before = {n for n, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    model.graft_attachment = record  # type: ignore[assignment]
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            vars(module)["save_pretrained"] = _no_save_pretrained


def came(record: Attachment, name: str) -> None:
    """Note that a delta is there."""
    record.version += 1
    record.attached[name] = record.version
    record.inside_experts.pop(name, None)


def _by_layer(model: nn.Module, config: DeltaConfig, deltas: dict[str, Delta], seed: int) -> dict[str, Delta]:
    """Layer -> delta, where the deltas of a layer's parts are one."""
    by_layer: dict[str, Delta] = {}
    of_parts: dict[str, dict[str, Delta]] = {}
    for name, delta in deltas.items():
        if delta.site.rows is None:
            by_layer[name] = delta
            continue
        layer, _, part = name.rpartition(".")
        of_parts.setdefault(layer, {})[part] = delta
        by_layer[layer] = delta  # to be replaced: the order is the model's
    for layer, parts in of_parts.items():
        site = replace(site_at(model, layer, seed, {}), shared=next(iter(parts.values())).site.shared)
        by_layer[layer] = together(site, config, parts).to(next(model.parameters()).device)
    return by_layer


def check_model(model: nn.Module) -> None:
    """Refuse a model on which a delta would be wrong: one with another library's adapters, or without its weights."""
    theirs = next((m for m in model.modules() if type(m).__module__.startswith("peft.")), None)
    if theirs is not None:
        raise TargetError(
            f"this model has adapters of PEFT on it ({type(theirs).__name__}), and deltas would sit on their parts. "
            "Take them off (`model = model.unload()`), or fold them in (`model = model.merge_and_unload()`), and "
            "attach to what that returns. A saved adapter of PEFT loads with graftlm.load_adapter(base, folder)",
            code="peft-adapters-on-model",
        )
    if not getattr(model, SKETCH, False) and (why := absent_weights(model)):
        raise TargetError(why, code="weights-not-in-memory")


def absent_weights(model: nn.Module) -> str:
    """The error message for a model whose weights are not all in memory; empty if they are."""
    absent = [name for name, p in model.named_parameters() if p.is_meta]
    if not absent:
        return ""
    return (
        f"{len(absent)} weights are not in memory, the first is {absent[0]}: accelerate keeps them on disk or on the "
        "CPU and brings them when a layer runs, and a delta needs them where it computes. Load the model whole "
        "(without device_map), in fewer bits if it does not fit (load_base(..., quantization='nf4'))"
    )


def _no_save_pretrained(*args: Any, **kwargs: Any) -> None:
    """Stands on a model with deltas: its tensors have other names there, and loading would make them anew at random."""
    raise TargetError(
        "save_pretrained: this model has deltas on it, and their layers have other names than transformers knows, so "
        "what it wrote could not be loaded. Write the deltas with graftlm.save_adapter(model, folder), the base with "
        "the deltas folded in with adapters.export.merged.merge_into(model, folder), or take them off (graftlm.detach)",
        code="deltas-on-model",
    )


def _check_statistics(config: DeltaConfig, sites: Sequence[Site], start: bool) -> None:
    names = needed_statistics(config) if start else ()
    for what in names:
        sites_without = [site.name for site in sites if what not in site.statistics]
        if sites_without:
            raise TargetError(
                f"{config.method} with init {config.init!r} starts from the {what} of each layer, which "
                f"{len(sites_without)} of {len(sites)} sites lack: give `statistics=collect(...)` "
                "(`graft train` gathers them from the training rows by itself)",
                code="missing-statistics",
            )


@torch.no_grad()
def _new_delta(model: nn.Module, site: Site, config: DeltaConfig, start: bool) -> Delta:
    delta = METHODS[config.method].delta(site, config_at(config, site.name))
    if start:
        delta.start()
        initialize(site, delta, config.init)
    return delta.to(next(model.parameters()).device)


def host_at(model: nn.Module, site: Site, record: Attachment) -> Host:
    """The host of the layer or sub-layer of a site, made where there is none."""
    module = model.get_submodule(site.name)
    there = module if isinstance(module, LayerHost) else getattr(module, CHILD, None)
    if isinstance(there, Host):
        return there
    record.structure += 1
    if site.kind not in ("sublayer", "block", "model"):
        layer_host = LayerHost(module, record.switch).train(module.training)
        _replace(model, site.name, layer_host)
        return layer_host
    if site.kind != "model":
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
            f"attend through transformers' interface with sdpa; this has {len(layers)} such layers and runs {kernel!r}",
            code="unsupported-attention",
        )
    record.kernel_before = kernel
    model.config._attn_implementation = prefix.NAME
    for layer in layers:
        layer.__dict__["graft_before"] = host


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take a delta (default: all) off again; where a host is left empty, the very module that it held comes back.

    Returns the model. Raises TargetError for a name that no delta has.
    """
    record = attachment(model)
    if name is None:
        names = (*record.configs, *record.factors)
    else:
        names = (name,) if name in record.factors else delta_names(model, [name])
    forget(model)
    for each in names:
        _take_off(model, each, record)
    for site_name, host in hosts(model).items():
        if not host.deltas and not host.factors:
            _remove_host(model, site_name, host, record)
            record.structure += 1
    if record.frozen and not record.configs and not record.factors:
        record.frozen, record.found_hosts = False, None
        for module in model.modules():
            vars(module).pop("save_pretrained", None)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in record.trainable_before)
    return model


def _take_off(model: nn.Module, name: str, record: Attachment) -> None:
    for host in known_hosts(model).values():
        host.drop_factors(name)
        if name in host.deltas:
            del host.deltas[name]
            host.active = tuple(n for n in host.active if n != name)
    if shared_of(model, name) is not None:
        delattr(model.get_submodule(SHARED), name)
        if not len(list(model.get_submodule(SHARED).children())):
            delattr(model, SHARED)
    tables = (record.configs, record.sites, record.seeds, record.attached, record.factors, record.inside_experts)
    for facts in (*tables, record.chats, record.tokenizers, record.heads):
        facts.pop(name, None)
    members = {key: tuple(other for other in names if other != name) for key, names in record.members.items()}
    record.members = {key: names for key, names in members.items() if key != name}
    record.version += 1


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
