"""An adapter as changes of weights: D = s B A at each of its sites, made one at a time.

A LoRA's own tensors, the factors of a method that has exact ones, or else the SVD of W_i - W on the base.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.factors import factors_of, lora_plan
from graftlm.adapters.load import attach_tensors, check_base, members_of
from graftlm.adapters.tensors import widened
from graftlm.combine.core import Change, factorize
from graftlm.errors import TargetError
from graftlm.model.attach import detach
from graftlm.model.hosts import LayerHost
from graftlm.model.registry import hosts
from graftlm.model.state_dict import mergeable

Changes = Mapping[str, Callable[[], Change]]
"""Site -> what makes its change."""


@contextmanager
def changes_of(model: nn.Module, adapter: Adapter, name: str, *, needs_rank: bool) -> Iterator[Changes]:
    """The changes of an adapter on its base.

    Inside, an adapter without exact factors is attached under `name`; then the model is as it was. `needs_rank`: such
    an adapter is refused, because it has changes of full rank and nobody said how much of them to keep. Raises
    TargetError for that and for a delta that does not change a weight matrix, AdapterError for one that does not fit,
    BaseModelError for one of another base.
    """
    if adapter.config is not None:
        check_base(model, adapter)
    members, _ = members_of(model, adapter)
    plan = lora_plan(model, members[0], bare=True) if len(members) == 1 else None
    if plan is not None:
        tensors = members[0].tensors
        yield {site: partial(_scaled, tensors[A], tensors[B], scale) for site, (A, B, scale) in plan.items()}
    elif (factors := factors_of(model, adapter)) is not None:
        yield {site: partial(_scaled, A, B, 1.0) for site, (A, B) in factors.items()}
    else:
        method = adapter.peft_config.get("peft_type") if adapter.config is None else adapter.config.method
        names, _ = attach_tensors(model, adapter, name)
        try:
            yield dict(_differences(model, names, str(method), needs_rank))
        finally:
            for each in names:
                detach(model, each)


def _scaled(A: Tensor, B: Tensor, scale: float) -> Change:
    return Change(widened(A).cpu(), widened(B).cpu(), scale)


def _differences(
    model: nn.Module, names: list[str], method: str, needs_rank: bool
) -> Iterator[tuple[str, Callable[[], Change]]]:
    for site, host in hosts(model).items():
        if here := [name for name in names if name in host.deltas]:
            layer = mergeable(host, here)
            if layer.view.kind == "norm":
                raise TargetError(
                    f"{site}: {method} changes a norm, and a LoRA has matrices only: merge the adapters into the base "
                    "(`graft merge`)",
                    code="not-plain-lora",
                )
            if needs_rank:
                raise TargetError(
                    f"{site}: {method} has no exact low-rank factors: give the rank to keep (`--rank 64`); the error "
                    "is reported",
                    code="missing-rank",
                )
            yield site, partial(_difference, site, layer, here, method)


def _difference(site: str, host: LayerHost, names: list[str], method: str) -> Change:
    """W_i - W, in as many factors as it takes."""
    W, b = host.effective(names=names)
    own = host.view.bias
    if b is not None and bool((b if own is None else b - own).any()):
        raise TargetError(
            f"{site}: {method} changes a bias, which a LoRA has no place for: merge the adapters into the base "
            "(`graft merge`)",
            code="not-plain-lora",
        )
    with torch.no_grad():
        X, Y, _ = factorize((W - host.view.weight).double().cpu())
    return Change(Y, X)
