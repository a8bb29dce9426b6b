"""Surgery: find the sites, put deltas on them, switch them on and off, take them away again.

A `Host` stands where the frozen layer stood and holds it untouched. With no active delta it calls that very layer, so
"deltas off" is the base bit for bit. Attaching changes the model in place and no weight of it.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.config import build, to_tree
from graftlm.deltas import METHODS
from graftlm.deltas.base import AdditiveDelta, Delta, DeltaConfig, Site, Targets, WeightDelta
from graftlm.deltas.inits import INITS
from graftlm.errors import TargetError, nearest
from graftlm.model.bases import KINDS, LinearBase, view
from graftlm.model.ops import low_rank_linear


class Host(nn.Module):
    """A frozen layer and the deltas on it. Dtype, dropout and the choice of the fast path live here, once."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.deltas = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    @property
    def view(self) -> LinearBase:
        made = view(self.base)
        assert made is not None, "attach() puts hosts on supported layers only"
        return made

    def on(self) -> list[Delta]:
        """The active deltas, in the order in which they act."""
        return [d for name in self.active if isinstance(d := self.deltas[name], Delta)]

    def forward(self, x: Tensor) -> Tensor:
        deltas, base = self.on(), self.view
        if not deltas:
            return base(x)
        # A change of weights acts on the frozen layer, any other delta on an output: so changes of weights come first.
        weights = [d for d in deltas if isinstance(d, WeightDelta)]
        others = [d for d in deltas if not isinstance(d, WeightDelta)]
        if not weights:
            y = base(x) if others[0].wants_y else x.new_empty(0)
        elif all(isinstance(d, AdditiveDelta) for d in weights):
            y = self._add(x, [d for d in weights if isinstance(d, AdditiveDelta)], base)
        else:
            y = self._fold(x, weights, base)
        for delta in others:
            y = delta(F.dropout(x, delta.config.dropout, training=self._drops(delta)), y, base)
        return y

    def _fold(self, x: Tensor, deltas: Sequence[WeightDelta], base: LinearBase) -> Tensor:
        W, b = base.weight, base.bias
        if not any(self._drops(d) for d in deltas):
            for delta in deltas:
                W, b = delta.effective(W, b)
            return base.apply(x, W, b)
        y = base(x)  # with dropout, what each delta changes is applied to its own x, and the base to the whole of it
        for delta in deltas:
            W_, b_ = delta.effective(W, b)
            shift = None if b_ is None else b_ if b is None else b_ - b
            y = y + base.apply(F.dropout(x, delta.config.dropout, training=self._drops(delta)), W_ - W, shift)
            W, b = W_, b_
        return y

    def _add(self, x: Tensor, deltas: Sequence[AdditiveDelta], base: LinearBase) -> Tensor:
        factors = [f for d in deltas if not self._drops(d) and (f := d.factors()) is not None]
        if len(factors) == len(deltas):  # the fast path: one operation, however many deltas there are
            A = torch.cat([a for a, _ in factors]) if len(factors) > 1 else factors[0][0]
            B = torch.cat([b for _, b in factors], dim=1) if len(factors) > 1 else factors[0][1]
            return low_rank_linear(x, base.stored_weight, base.stored_bias, A, B)
        y = base(x)
        for delta in deltas:
            y = y + delta.increment(F.dropout(x, delta.config.dropout, training=self._drops(delta)), base)
        return y

    def _drops(self, delta: Delta) -> bool:
        return delta.training and delta.config.dropout > 0

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """(W', b') in float32 with the active deltas folded in, in order; TargetError if one is not mergeable."""
        W, b = self.view.weight, self.view.bias
        for name in self.active:
            delta = self.deltas[name]
            if not isinstance(delta, WeightDelta):
                raise TargetError(
                    f"delta {name!r} ({type(delta).__name__}) is no change of weights: it cannot be merged"
                )
            W, b = delta.effective(W, b)
        return W, b


@dataclass
class Attachment:
    """What a model with deltas remembers: the config of each, and which parameters were trainable before the first."""

    configs: dict[str, DeltaConfig] = field(default_factory=dict)
    sites: dict[str, tuple[str, ...]] = field(default_factory=dict)
    trainable_before: set[str] = field(default_factory=set)


def attachment(model: nn.Module) -> Attachment:
    """The model's record of its deltas; an empty one where it has none."""
    kept = getattr(model, "graft_attachment", None)
    return kept if isinstance(kept, Attachment) else Attachment()


def hosts(model: nn.Module) -> dict[str, Host]:
    """Every host by the name of the site, which is the name that the frozen layer has in the base."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Host)}


# Finding sites ---------------------------------------------------------------------------------------------------


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that a delta can sit on, by name, in the order of the model; a host counts as the layer it holds."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []  # a delta may have layers of its own, on which no other delta sits
    for name, module in model.named_modules():
        if isinstance(module, Host):
            found[name] = module.base
            inside.append(f"{name}.")
        elif view(module) is not None and not name.startswith(tuple(inside)):
            found[name] = module
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, or None for a model without one."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    return head.base if isinstance(head, Host) else head


def find_sites(model: nn.Module, targets: Targets) -> list[str]:
    """The names of the layers that `targets` means; raises TargetError for anything that matches no layer.

    `all-linear`: every linear layer but the output head. Another string: a regular expression for the whole name.
    A tuple: each entry the end of a name, from a dot on (the rules of PEFT, so that its adapters mean the same here).
    """
    layers = candidates(model)
    if targets == "all-linear":
        head = output_head(model)
        return [name for name, layer in layers.items() if layer is not head]
    if isinstance(targets, str):
        pattern = _compile(targets)
        found = [name for name in layers if pattern.fullmatch(name)]
        if not found:
            raise TargetError(f"targets: the regular expression {targets!r} matches no layer. {_what_there_is(model)}")
        return found
    for suffix in targets:
        if not any(_ends_with(name, suffix) for name in layers):
            others = [n for n, m in model.named_modules() if _ends_with(n, suffix)]
            if others:
                kind = type(model.get_submodule(others[0])).__name__
                raise TargetError(
                    f"targets: {suffix!r} is a {kind} ({others[0]}); a delta can sit on "
                    f"{', '.join(k.__name__ for k in KINDS)}. {_what_there_is(model)}"
                )
            near = nearest(suffix, [n.rpartition(".")[2] for n in layers])
            raise TargetError(f"targets: {suffix!r} matches no layer. {near}\n{_what_there_is(model)}")
    return [name for name in layers if any(_ends_with(name, suffix) for suffix in targets)]


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{pattern!r} is no regular expression: {error}") from None


def _what_there_is(model: nn.Module) -> str:
    """The kinds of name among the layers, with how many there are of each: the list a user needs to mend targets."""
    counts: dict[str, int] = {}
    for name in candidates(model):
        generic = re.sub(r"\.\d+\.", ".*.", name)
        counts[generic] = counts.get(generic, 0) + 1
    return "This model has: " + ", ".join(f"{name} ({n})" for name, n in counts.items())


def config_at(config: DeltaConfig, name: str) -> DeltaConfig:
    """The config for one site: the fields of the first pattern that matches the end of its name are replaced."""
    for pattern, overrides in config.patterns.items():
        if _pattern_matches(pattern, name):
            return build(type(config), to_tree(config) | dict(overrides), source=f"patterns: {pattern!r}")
    return config


def _pattern_matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _check_patterns(config: DeltaConfig, sites: Sequence[str]) -> None:
    peft = METHODS[config.method].delta.peft  # what PEFT's format cannot say would be lost when the adapter is read
    allowed = (
        set(peft.patterns) if peft else {f.name for f in fields(config)} - {"method", "init", "targets", "patterns"}
    )
    for pattern, overrides in config.patterns.items():
        _compile(pattern)
        if not any(_pattern_matches(pattern, name) for name in sites):
            raise TargetError(f"patterns: {pattern!r} matches none of the {len(sites)} sites, such as {sites[0]}")
        for key in overrides:
            if key not in allowed:
                raise TargetError(f"patterns: {pattern!r} sets {key!r}, which no pattern can. {nearest(key, allowed)}")


# Attaching and detaching -----------------------------------------------------------------------------------------


def attach(
    model: nn.Module, config: DeltaConfig, *, targets: Targets | None = None, name: str = "default", seed: int = 0
) -> nn.Module:
    """Freeze `model` and put a delta on every site of `targets` (default: the config's own); active at once.

    The model is changed in place, and returned. `seed` gives every site its own random start, the same in each run.
    Raises TargetError for targets or patterns that match nothing, and for a name that is taken; RecipeError for a
    value in a pattern that is out of range. The model is then as it was.
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
    if config.init not in INITS:
        raise TargetError(f"init: {config.init!r} is unknown. {nearest(config.init, INITS)}")
    sites = find_sites(model, config.targets)
    if not sites:
        raise TargetError(f"targets: {config.targets!r} matches no layer. {_what_there_is(model)}")
    _check_patterns(config, sites)
    deltas = {site: _new_delta(model, site, config, seed) for site in sites}  # all are made before the model is touched
    if not record.configs:
        record.trainable_before = {n for n, p in model.named_parameters() if p.requires_grad}
        model.requires_grad_(False)
        model.graft_attachment = record  # type: ignore[assignment]
    for site_name, delta in deltas.items():
        module = model.get_submodule(site_name)
        host = module if isinstance(module, Host) else _put_host(model, site_name, module)
        host.deltas[name] = delta.train(host.training)  # a new module is in training mode, with dropout on
        host.active = (*host.active, name)
    record.configs[name] = config
    record.sites[name] = tuple(sites)
    return model


def _new_delta(model: nn.Module, name: str, config: DeltaConfig, seed: int) -> Delta:
    module = model.get_submodule(name)
    base = view(module.base if isinstance(module, Host) else module)
    assert base is not None, "find_sites() finds supported layers only"
    site = Site(name, base.d_in, base.d_out, lambda: base.weight, _site_seed(seed, name))
    delta = METHODS[config.method].delta(site, config_at(config, name))
    with torch.no_grad():
        for key, start in INITS[config.init](site, delta).items():
            delta.get_parameter(key).copy_(start)
    return delta.to(base.stored_weight.device)


def _site_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _put_host(model: nn.Module, name: str, layer: nn.Module) -> Host:
    host = Host(layer).train(layer.training)
    _replace(model, name, host)
    return host


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take a delta (default: all) off again; where a host is left empty, the very module that it held comes back."""
    record = attachment(model)
    if name is not None and name not in record.configs:
        raise TargetError(f"no delta {name!r} on this model. {nearest(name, record.configs)}")
    for gone in [name] if name is not None else list(record.configs):
        for site_name, host in hosts(model).items():
            if gone in host.deltas:
                del host.deltas[gone]
                host.active = tuple(n for n in host.active if n != gone)
            if not host.deltas:
                _replace(model, site_name, host.base)
        del record.configs[gone], record.sites[gone]
    if not record.configs:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in record.trainable_before)
    return model


def activate(model: nn.Module, *names: str) -> None:
    """Switch on exactly these deltas, in this order; none for the bare base."""
    known = attachment(model).configs
    for name in names:
        if name not in known:
            raise TargetError(f"no delta {name!r} on this model. {nearest(name, known)}")
    for host in hosts(model).values():
        host.active = tuple(n for n in names if n in host.deltas)


@contextmanager
def deltas_off(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model is its base, bit for bit; afterwards the same deltas are active as before."""
    found = list(hosts(model).values())
    before = [host.active for host in found]
    for host in found:
        host.active = ()
    try:
        yield model
    finally:
        for host, active in zip(found, before, strict=True):
            host.active = active


# Reading weights out ---------------------------------------------------------------------------------------------


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen base's own parameters by the names that they have without any host; tied ones once."""
    found = hosts(model)
    of_deltas = {id(p) for host in found.values() for p in host.deltas.parameters()}
    return {_without_host(name, found): p for name, p in model.named_parameters() if id(p) not in of_deltas}


def merged_state(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict of the base with the active deltas folded in: new tensors under the base's own names.

    Nothing in the model is changed. Tensors that share memory in the model (a tied head) share it here too, unless a
    delta sits on one of them. Raises TargetError where an active delta is no change of weights.
    """
    found = hosts(model)
    changed: dict[str, Tensor | None] = {}
    with torch.no_grad():
        for name, host in found.items():
            if host.active:
                W, b = host.effective()
                # A delta may return the base's own W or b: a copy, so that whoever edits the state edits no model.
                kept = host.view.store(W)
                changed[f"{name}.weight"] = kept.to(dtype, copy=True, memory_format=torch.contiguous_format)
                changed[f"{name}.bias"] = None if b is None else b.to(dtype, copy=True)
        state: dict[str, Tensor] = {}
        converted: dict[tuple[int, torch.Size], Tensor] = {}
        for key, tensor in model.state_dict().items():
            if ".deltas." in key and key.partition(".deltas.")[0] in found:
                continue
            name = _without_host(key, found)
            if (new := changed.pop(name, None)) is not None:
                state[name] = new
                continue
            identity = (tensor.data_ptr(), tensor.shape)
            if identity not in converted:
                converted[identity] = tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
            state[name] = converted[identity]
        state.update({name: tensor for name, tensor in changed.items() if tensor is not None})  # a bias that is new
    return state


def _without_host(key: str, found: dict[str, Host]) -> str:
    site, dot, rest = key.rpartition(".base.")
    return f"{site}.{rest}" if dot and site in found else key
