"""What deltas a model has: the record of them, their hosts, and their parameters by name."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftlm.deltas.base import Delta, DeltaConfig
from graftlm.errors import TargetError, nearest
from graftlm.model.hosts import Host
from graftlm.model.parts import expanded
from graftlm.model.sites import CHILD
from graftlm.model.switch import Switch

SHARED = "graft_shared"


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
    """The chat of each adapter that was trained, or loaded, with a chat template."""
    tokenizers: dict[str, Any] = field(default_factory=dict)
    """The tokenizer of each that was loaded with one."""
    heads: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """For each adapter whose objective trained heads: HEAD.PARAMETER -> tensor."""
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name of an adapter that is several deltas -> their names, in the order in which they act: what is done to the
    adapter is done to all of them."""
    frozen: bool = False
    """Whether the base is frozen, from the first delta on until the last is gone."""
    trainable_before: set[str] = field(default_factory=set)
    kernel_before: str | None = None
    version: int = 0
    """Changes with every delta that comes or goes."""
    structure: int = 0
    """Changes with every host that comes or goes."""
    attached: dict[str, int] = field(default_factory=dict)
    """Name -> `version` when it came: what tells a delta from an earlier one of its name."""
    factors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name of what `attach_factors` put on the model -> its sites. It acts where a request or a row names it."""
    inside_experts: dict[str, str | None] = field(default_factory=dict)
    """Name -> a site of it inside an expert, or None; of those that were asked for."""
    found_hosts: tuple[int, "dict[str, Host]"] | None = None
    """(structure, the hosts then)"""
    switch: Switch = field(default_factory=Switch)


def attachment(model: nn.Module) -> Attachment:
    """The model's record of its deltas; an empty one where it has none."""
    record = getattr(model, "graft_attachment", None)
    return record if isinstance(record, Attachment) else Attachment()


def hosts(model: nn.Module) -> dict[str, Host]:
    """Every host by the name of its site, which is the name that the layer or sub-layer has in the base."""
    return {_site_name(name): module for name, module in model.named_modules() if isinstance(module, Host)}


def _site_name(name: str) -> str:
    return name.removesuffix(f".{CHILD}")


def known_hosts(model: nn.Module) -> dict[str, Host]:
    """`hosts`, looked for again only where one came or went since the last time."""
    record = attachment(model)
    if record.found_hosts is None or record.found_hosts[0] != record.structure:
        record.found_hosts = record.structure, hosts(model)
    return record.found_hosts[1]


def forget(model: nn.Module) -> None:
    """Drop what hosts know of the deltas on them, in every copy of the model for inference."""
    for host in known_hosts(model).values():
        host.known.clear()


def deltas_by_site(model: nn.Module) -> Iterator[tuple[str, str, Delta]]:
    """(name of the delta, name of the site, the delta there) in the model's order, each part of a layer by itself."""
    for site, host in hosts(model).items():
        for name, delta in host.deltas.items():
            for where, part in expanded(site, delta):
                yield name, where, part


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


def delta_names(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The deltas that are meant, all of an adapter that is several; TargetError for a name that is none."""
    record = attachment(model)
    for name in names:
        if name in record.factors:
            raise TargetError(
                f"{name!r} is on this model for answers alone (attach_factors): name it in a request or in by_row. "
                "What is activated, merged, saved or trained is attached as a delta (graftlm.load_adapter)",
                code="factors-alone",
            )
        if name not in record.configs:
            raise TargetError(f"no delta {name!r} on this model. {nearest(name, record.configs)}", code="no-such-delta")
    return tuple(dict.fromkeys(each for name in names for each in record.members.get(name, (name,))))


def expert_site(model: nn.Module, name: str) -> str | None:
    """A site of a delta inside an expert, where a router chooses which tokens come; None where it has none."""
    record = attachment(model)
    if name not in record.inside_experts:
        sites = (*record.sites.get(name, ()), *record.factors.get(name, ()))
        record.inside_experts[name] = next((site for site in sites if "experts" in site.split(".")), None)
    return record.inside_experts[name]


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
