"""Which deltas of a model are on: all of them, some, none, in training or not, each row of a batch with its own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from graphlib import TopologicalSorter
from typing import Any

from torch import Tensor, nn

from graftlm.deltas.base import InputDelta
from graftlm.errors import TargetError
from graftlm.model.registry import (
    attachment,
    delta_names,
    deltas_by_site,
    expert_site,
    hosts,
    known_hosts,
)
from graftlm.model.routes import Row
from graftlm.model.sites import decoder_of
from graftlm.model.switch import Switch


def activate(model: nn.Module, *names: str) -> None:
    """Switch on exactly these deltas, in this order; none for the bare base.

    Returns nothing. Raises TargetError for a name that no delta has; the model is then as it was.
    """
    names = delta_names(model, names)
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
    names = delta_names(model, names)
    found = list(hosts(model).values())
    before = [host.active for host in found]
    for host in found:
        host.active = tuple(n for n in names if n in host.deltas)
    try:
        yield model
    finally:
        for host, active in zip(found, before, strict=True):
            host.active = active


def active_row(model: nn.Module) -> Row:
    """The active deltas in the order in which they act, each with the whole of its change."""
    order: TopologicalSorter[str] = TopologicalSorter()
    for host in hosts(model).values():
        for number, name in enumerate(host.active):
            order.add(name, *host.active[:number])
    return dict.fromkeys(order.static_order(), 1.0)


@contextmanager
def deltas_still(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[nn.Module]:
    """Inside, the deltas (or those of `names`) are as they are used, without dropout; afterwards each is in the mode
    that it was in."""
    learning: list[nn.Module] = []
    if names is None:
        learning = [d for host in hosts(model).values() for d in host.deltas.values() if d.training]
    elif modules := [name for name in names if name in attachment(model).configs]:
        found = (host.deltas for host in known_hosts(model).values())
        learning = [deltas[name] for deltas in found for name in modules if name in deltas and deltas[name].training]
    for delta in learning:
        delta.eval()
    try:
        yield model
    finally:
        for delta in learning:
            delta.train()


@contextmanager
def by_row(model: nn.Module, rows: Sequence[Sequence[str] | Row]) -> Iterator[nn.Module]:
    """Inside, each row of a batch has the deltas that `rows` names for it, in that order; () is the bare base.

    A row may be a mapping from deltas to weights: {"a": 0.3} makes three tenths of the change that `a` makes, as
    `combine.merge` would. Generation repeats a row for its beams and for several answers, which have the row's deltas.
    Yields the model. Raises TargetError for a delta that is not on the model, a weight on a prefix or prompt, which are
    there or not, and a batch that is no multiple of the rows.
    """
    weighted_rows = [weighted_row(model, row) for row in rows]
    _check_rows(model, weighted_rows)
    switch = attachment(model).switch
    before, switch.rows = switch.rows, weighted_rows
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


def weighted_row(model: nn.Module, row: Sequence[str] | Row) -> Row:
    """Delta -> its weight in a row, in order; all parts of an adapter have the weight that its name has."""
    weights = row if isinstance(row, Mapping) else dict.fromkeys(row, 1.0)
    factors = attachment(model).factors
    return {
        part: weight
        for name, weight in weights.items()
        for part in ((name,) if name in factors else delta_names(model, [name]))
    }


def _check_rows(model: nn.Module, rows: Sequence[Row]) -> None:
    for row in rows:
        check_weights(model, row)
    if site := _mixing_site(model, rows):
        raise TargetError(
            f"{site}: which tokens reach an expert is its router's choice, so it cannot be told which belong to "
            "which row. Run the rows one by one, or give all of them the same deltas",
            code="rows-not-separable",
        )


def check_weights(model: nn.Module, row: Row) -> None:
    """Raise TargetError for a weight on a prefix or prompt that is neither 0 nor 1."""
    if all(weight in (0, 1) for weight in row.values()):
        return
    for name, _, delta in deltas_by_site(model):
        if isinstance(delta, InputDelta) and row.get(name, 1) not in (0, 1):
            raise TargetError(
                f"{name!r} is a {delta.config.method}: it is there or not, so its weight is 0 or 1",
                code="invalid-weight",
            )


def can_mix_rows(model: nn.Module, rows: Sequence[Row]) -> bool:
    """Whether these rows can go through the model in one pass."""
    return _mixing_site(model, rows) is None


def _mixing_site(model: nn.Module, rows: Sequence[Row]) -> str | None:
    """A site inside an expert where the deltas of the rows differ."""
    differ = {name for row in rows for name, weight in row.items() if any(other.get(name) != weight for other in rows)}
    return next((site for name in differ if (site := expert_site(model, name)) is not None), None)


def _begin(switch: Switch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids"))]
    switch.begin(next((t for t in inputs if isinstance(t, Tensor) and t.dim() >= 2), None))
