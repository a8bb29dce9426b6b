"""Adapters for answers alone: (A, B) of each layer, on the model in milliseconds and off again.

    attach_factors(model, "one", {site: (A, B), ...})
    engine.run([Request(ids, 64, adapters=("one",)), ...])
    detach_factors(model, "one")

There is no module and no parameter: nothing learns, `state_dict` has nothing of it, and a thousand of them do not slow
down what walks over the modules of a model. What has such factors stands in `graftlm/adapters/factors.py`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.deltas import METHODS
from graftlm.errors import TargetError, nearest
from graftlm.kernels.many_low_rank import by_columns
from graftlm.model.acting import FixedFactors
from graftlm.model.attach import begin, came, check_model, check_name, host_at
from graftlm.model.hosts import Host, LayerHost
from graftlm.model.registry import attachment, forget, known_hosts
from graftlm.model.routed import Experts, Gates, RoutedFactors, sites_of_all
from graftlm.model.sites import sites_of

DTYPES = (torch.float32, torch.bfloat16)
"""The dtypes that factors may have."""


def attach_factors(
    model: nn.Module,
    name: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Put dW = B A on each layer of `factors`: site -> (A [r, d_in], B [d_out, r]), the scale of the adapter in B.

    It acts where a request (`Request.adapters`) or `by_row` names it, with any weight; it is never active by itself.
    `dtype` float32 or bfloat16 is what the factors are held in (default: each as it comes); products with them are
    summed in float32 either way. The tensors are kept, not copied, where dtype, device and layout (A by rows, B by
    columns: `many_low_rank.by_columns`) are right already.
    Other threads may generate meanwhile if the caller holds `engine.model_lock(model)`; no engine makes anything anew
    for it where every layer had a host before. Returns nothing. Raises TargetError for a name that is taken, for a site
    that is no layer for low-rank factors, and for shapes and dtypes that do not fit; the model is then as it was.
    """
    record = attachment(model)
    check_name(record, name)
    if not factors:
        raise TargetError(f"{name!r} has factors for no layer", code="no-layer-matches")
    if dtype is not None and dtype not in DTYPES:
        raise TargetError(f"factors are held in float32 or bfloat16, not in {dtype}", code="factors-do-not-fit")
    sites = _without_host(model, factors)
    _check_sizes(model, sites, factors)
    device = next(model.parameters()).device
    held = {
        site: FixedFactors(_cast(A, dtype).contiguous(), by_columns(_cast(B, dtype)))
        for site, (A, B) in factors.items()
    }
    _put(model, name, sites, {site: FixedFactors(A.to(device), B.to(device)) for site, (A, B) in held.items()})


def attach_routed(
    model: nn.Module,
    name: str,
    adapters: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    gates: Callable[[str, Experts], Gates],
) -> None:
    """Put a mixture of adapters on the model in which every token at every layer has weights of its own.

    `adapters`: name -> site -> (A, B), as `attach_factors` takes them. `gates(site, experts)` is called once for each
    site and returns what makes weights of the site's input. It acts where a request or `by_row` names `name`, and
    `detach_factors` takes it off. All is held in float32 at least, in memory of its own. Returns nothing. Raises what
    `attach_factors` does; the model is then as it was.
    """
    check_name(attachment(model), name)
    if not any(adapters.values()):
        raise TargetError(f"{name!r} has factors for no layer", code="no-layer-matches")
    sites: dict[str, Any] = {}
    for factors in adapters.values():
        sites |= _without_host(model, factors)
        _check_sizes(model, sites, factors)
    _check_linear(model, sites, adapters)
    device = next(model.parameters()).device
    experts = {site: each.to(device) for site, each in sites_of_all(adapters).items()}
    _put(model, name, sites, {site: RoutedFactors(each, gates(site, each)) for site, each in experts.items()})


def detach_factors(model: nn.Module, name: str) -> None:
    """Take off what `attach_factors` put on. Its hosts stay for the next one; `detach` removes them.

    Requests that it acts on fail with `target/delta-changed` at their next step. Returns nothing. Raises TargetError
    for a name that `attach_factors` did not put on this model.
    """
    record = attachment(model)
    if name not in record.factors:
        raise TargetError(
            f"attach_factors put no {name!r} on this model. {nearest(name, record.factors)}", code="no-such-delta"
        )
    found = known_hosts(model)
    for site in record.factors.pop(name):
        found[site].drop_factors(name)
    forget(model)
    del record.attached[name]
    record.inside_experts.pop(name, None)
    record.version += 1


def _without_host(model: nn.Module, factors: Mapping[str, Any]) -> dict[str, Any]:
    """The sites of layers that have no host yet, checked as for a delta."""
    found_hosts = known_hosts(model)
    names = [site for site in factors if not isinstance(found_hosts.get(site), LayerHost)]
    if not names:
        return {}
    check_model(model)
    lora = METHODS["lora"].config
    found = {site.name: site for site in sites_of(model, lora(method="lora", targets="|".join(map(re.escape, names))))}
    if missing := [name for name in names if name not in found]:
        raise TargetError(
            f"{missing[0]} is no layer that low-rank factors can sit on. {nearest(missing[0], found)}",
            code="no-layer-matches",
        )
    return {name: found[name] for name in names}


def _check_sizes(model: nn.Module, sites: Mapping[str, Any], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    found = known_hosts(model)
    for site, (A, B) in factors.items():
        d_in, d_out = (sites[site].d_in, sites[site].d_out) if site in sites else _size(found[site])
        if A.dim() != 2 or B.dim() != 2 or A.shape[1] != d_in or B.shape[0] != d_out or len(A) != B.shape[1]:
            raise TargetError(
                f"{site}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit this layer: A must be [r, {d_in}] and B "
                f"[{d_out}, r]",
                code="factors-do-not-fit",
            )
        for t in (A, B):
            _check_numbers(t, site)


def _check_linear(model: nn.Module, sites: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]]) -> None:
    found = known_hosts(model)
    for where in dict.fromkeys(site for factors in adapters.values() for site in factors):
        there: Any = sites[where] if where in sites else found[where].view
        if there.kind != "linear":
            raise TargetError(
                f"{where}: this is no linear layer, so its input has no direction to route by. Leave adapters that "
                "change it out, or route whole requests",
                code="not-a-linear-layer",
            )


def _put(
    model: nn.Module, name: str, sites: Mapping[str, Any], held: Mapping[str, FixedFactors | RoutedFactors]
) -> None:
    """Hosts where there are none, and on each what is held for its site."""
    record = attachment(model)
    begin(model, record)
    for site in sites.values():
        host_at(model, site, record)
    found = known_hosts(model)
    for where, each in held.items():
        found[where].factors[name] = each
    record.factors[name] = tuple(held)
    came(record, name)


def _size(host: Host) -> tuple[int, int]:
    assert isinstance(host, LayerHost)
    return host.view.d_in, host.view.d_out


def _check_numbers(t: Tensor, site: str) -> None:
    if not t.is_floating_point():
        raise TargetError(f"{site}: factors are numbers, not {t.dtype}", code="factors-do-not-fit")


def _cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    new_dtype = dtype or (t.dtype if t.dtype in DTYPES else torch.float32)
    return t.detach().to(new_dtype)
