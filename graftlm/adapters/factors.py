"""The low-rank factors that an adapter is, for answers: a folder of LoRA is on a model in milliseconds.

adapter = Adapter.read(folder)
if (factors := factors_of(model, adapter)) is not None:
    attach_factors(model, "one", factors, dtype=torch.bfloat16)
"""

import torch
from torch import Tensor, nn

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.folder import WEIGHTS
from graftlm.adapters.foreign.reading import Member
from graftlm.adapters.load import check_base, members_of
from graftlm.adapters.tensors import PREFIX, check_rebuilt, fill, make_room_in, modules_in, stored_in, sums_in
from graftlm.deltas import METHODS
from graftlm.deltas.base import AdditiveDelta
from graftlm.errors import AdapterError, TargetError
from graftlm.model.acting import all_factors, widened
from graftlm.model.attach import new_deltas
from graftlm.model.bases import view
from graftlm.model.hosts import LayerHost
from graftlm.model.registry import known_hosts
from graftlm.model.sites import config_at, places

Factors = dict[str, tuple[Tensor, Tensor]]
"""Site -> (A [r, d_in], B [d_out, r]): the site's weight changes by B A, every scale and offset in it."""

LoraPlan = dict[str, tuple[str, str, float]]
"""Site -> (key of A, key of B, scale), of an adapter that is dW = scale B A on each of its layers and nothing else."""


@torch.no_grad()
def factors_of(model: nn.Module, adapter: Adapter, *, trust_base: bool = False) -> Factors | None:
    """The factors of an adapter, for `attach_factors`; None if one of its deltas has no plain factors on this base.

    Attached, they compute what `attach_adapter` would. Raises what that raises: AdapterError for an adapter that does
    not fit, BaseModelError for one of another base. The model is not touched. Tokenizer and chat template of the
    adapter are the caller's to use.
    """
    if adapter.config is not None:
        check_base(model, adapter, trust_base)
    members, _ = members_of(model, adapter)
    if len(members) != 1:
        return None
    (member,) = members
    if not issubclass(METHODS[member.config.method].delta, AdditiveDelta):
        return None
    plan = lora_plan(model, member)
    if plan is None:
        return _of_any(model, adapter, member, trust_base)
    return {site: (member.tensors[A], widened(member.tensors[B]) * scale) for site, (A, B, scale) in plan.items()}


def lora_plan(model: nn.Module, member: Member, *, bare: bool = False) -> LoraPlan | None:
    """The names of the tensors of a LoRA; None where some have none (parts of layers, embeddings, layers without a
    host, missing tensors, others beside A and B). `bare`: layers without a host count too."""
    config, plan = member.config, LoraPlan()
    if config.method != "lora" or member.layout is None:
        return None
    (A_name, B_name), hosts = (f".{member.layout.tensors[key]}" for key in "AB"), known_hosts(model)
    without = places(model) if bare else {}
    for key, A in member.tensors.items():
        if not key.endswith(A_name):
            continue
        site = key.removeprefix(PREFIX).removesuffix(A_name)
        B_key, host = f"{PREFIX}{site}{B_name}", hosts.get(site)
        B = member.tensors.get(B_key)
        layer = host.view if isinstance(host, LayerHost) else None
        if host is None and site in without:
            layer = view(without[site].module)
        if B is None or layer is None or layer.kind != "linear":
            return None
        there = config_at(config, site) if config.patterns else config
        r, alpha, rslora = (getattr(there, name) for name in ("r", "alpha", "rslora"))
        if A.shape != (r, layer.d_in) or B.shape != (layer.d_out, r):
            return None  # whoever makes the deltas says what is wrong
        plan[site] = key, B_key, alpha / (r**0.5 if rslora else r)
    return plan if 2 * len(plan) == len(member.tensors) else None


def _of_any(model: nn.Module, adapter: Adapter, member: Member, trust_base: bool) -> Factors | None:
    """By making the deltas, and filling them with the tensors."""
    where = adapter.where
    try:
        new = new_deltas(model, member.config, seed=adapter.seed, start=False)
    except TargetError as error:
        raise AdapterError(f"{where}: does not fit this model: {error}", code="does-not-fit-model") from None
    modules = modules_in(new.deltas, new.shared)
    make_room_in(modules, member.layout, member.tensors, next(model.parameters()).device)
    fill(stored_in(modules, member.layout), member.tensors, where / WEIGHTS)
    if adapter.config is not None and not trust_base:
        check_rebuilt(sums_in(modules), adapter.rebuilt, where)
    found = Factors()
    for site, delta in new.deltas.items():
        factors = all_factors(delta.eval()) if isinstance(delta, AdditiveDelta) else None
        if factors is None:
            return None
        found[site] = factors[0].detach(), factors[1].detach()
    return found
