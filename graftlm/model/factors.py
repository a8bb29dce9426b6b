"""Adapters for answers alone: (A, B) of each layer, on the model in milliseconds and off again.

    attach_factors(model, "one", {site: (A, B), ...})
    engine.run([Request(ids, 64, adapters=("one",)), ...])
    detach_factors(model, "one")

There is no module and no parameter: nothing learns, `state_dict` has nothing of it, and a thousand of them do not slow
down what walks over the modules of a model. What has such factors stands in `graftlm/adapters/factors.py`.
"""

import re
from collections.abc import Mapping
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
    found = known_hosts(model)
    missing = [site for site in factors if not isinstance(found.get(site), LayerHost)]
    sites = _sites(model, missing) if missing else {}
    sizes = {name: (site.d_in, site.d_out) for name, site in sites.items()}
    fixed_factors = {}
    for site, (A, B) in factors.items():
        d_in, d_out = sizes[site] if site in sizes else _size(found[site])
        if A.dim() != 2 or B.dim() != 2 or A.shape[1] != d_in or B.shape[0] != d_out or len(A) != B.shape[1]:
            raise TargetError(
                f"{site}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit this layer: A must be [r, {d_in}] and B "
                f"[{d_out}, r]",
                code="factors-do-not-fit",
            )
        fixed_factors[site] = FixedFactors(_cast(A, dtype, site).contiguous(), by_columns(_cast(B, dtype, site)))
    begin(model, record)
    device = next(model.parameters()).device
    for site in missing:
        host_at(model, sites[site], record)
    found = known_hosts(model)
    for site, (A, B) in fixed_factors.items():
        found[site].factors[name] = FixedFactors(A.to(device), B.to(device))
    record.factors[name] = tuple(fixed_factors)
    came(record, name)


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


def _sites(model: nn.Module, names: list[str]) -> dict[str, Any]:
    """The sites of layers that have no host yet, checked as for a delta."""
    check_model(model)
    lora = METHODS["lora"].config
    found = {site.name: site for site in sites_of(model, lora(method="lora", targets="|".join(map(re.escape, names))))}
    if missing := [name for name in names if name not in found]:
        raise TargetError(
            f"{missing[0]} is no layer that low-rank factors can sit on. {nearest(missing[0], found)}",
            code="no-layer-matches",
        )
    return found


def _size(host: Host) -> tuple[int, int]:
    assert isinstance(host, LayerHost)
    return host.view.d_in, host.view.d_out


def _cast(t: Tensor, dtype: torch.dtype | None, site: str) -> Tensor:
    if not t.is_floating_point():
        raise TargetError(f"{site}: factors are numbers, not {t.dtype}", code="factors-do-not-fit")
    new_dtype = dtype or (t.dtype if t.dtype in DTYPES else torch.float32)
    return t.detach().to(new_dtype)
