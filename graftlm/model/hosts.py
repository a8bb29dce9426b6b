"""Hosts: what stands in the model where deltas sit, and computes with those that are on.

    LayerHost     takes the place of a frozen layer (linear, embedding, norm) and holds it untouched
    SubLayerHost  beside an attention or feed-forward block, or a whole transformer layer: sees its input and changes
                  its output
    ModelHost     beside the decoder: what every sequence attends to before itself

Dtype, dropout, the choice of the fast path, the order of several deltas and different deltas for the rows of a batch
live here, once. With no active delta a host does exactly what the base does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftlm.deltas.base import KNOWN, AdditiveDelta, Delta, InputDelta, WeightDelta
from graftlm.errors import TargetError
from graftlm.kernels.attention import LAYOUT, SegmentLayout, use_layout
from graftlm.model import prefix
from graftlm.model.acting import (
    Acting,
    Change,
    FixedFactors,
    Split,
    as_one,
    dropped,
    drops,
    folded,
    folded_partly,
    has_own_increment,
    in_dtype_of,
    key_of,
    partly,
    residual,
    split,
)
from graftlm.model.bases import LinearBase, view
from graftlm.model.plans import Here, Parts, Plan, computed, parts_of, plan_of
from graftlm.model.routed import RoutedFactors
from graftlm.model.routes import ROUTE, Route, Row, tokens_of
from graftlm.model.switch import Switch

CACHE_NAMES = ("cache", "past_key_values")
"""How transformers' decoders call the cache: from 5.24 on, and before."""


class Host(nn.Module):
    """The deltas at one site by name, and those of them that are on, in the order in which they act."""

    def __init__(self, switch: Switch) -> None:
        super().__init__()
        self.deltas = nn.ModuleDict()
        self.factors: dict[str, FixedFactors | RoutedFactors] = {}
        """What acts in answers alone, where a request names it. (`factors.py`)"""
        self.parts_of_factors: dict[Here, Parts] = {}
        """What plans have of rows with such factors alone. They learn nothing: it stays until one of them goes."""
        self.active: tuple[str, ...] = ()
        self.switch = switch
        self.known: dict[Any, Any] = {}
        """What was computed of the deltas alone. A copy of a host for inference (`remembers`) has the same."""
        self.remembers = False

    def on(self, names: Sequence[str] | None = None) -> list[Delta]:
        """The active deltas (or those of `names` that sit here), in order."""
        chosen = self.active if names is None else [name for name in names if name in self.deltas]
        return [d for name in chosen if isinstance(d := self.deltas[name], Delta)]

    def acting(self) -> list[Acting]:
        """The active deltas, each with the whole of its change."""
        return [(delta, 1.0) for delta in self.on()]

    def drop_factors(self, name: str) -> None:
        if self.factors.pop(name, None) is not None:
            for here in [each for each in self.parts_of_factors if any(name == other for other, _ in each)]:
                del self.parts_of_factors[here]

    def named(self, here: Here) -> list[Acting]:
        """The deltas and factors of a row."""
        found = [(self.factors.get(name) or self.deltas[name], weight) for name, weight in here]
        return [(d, weight) for d, weight in found if isinstance(d, Delta | FixedFactors | RoutedFactors)]

    def groups(self, x: Tensor) -> Iterator[tuple[list[int], list[Acting]]]:
        """What of x has the same deltas here with the same weights, together: (indices along x's first dimension,
        deltas)."""
        wanted = self.switch.rows
        assert wanted is not None
        found: dict[Here, list[int]] = {}
        for row, weights in enumerate(wanted):
            found.setdefault(self.here(weights), []).append(row)
        each = 1
        if len(found) > 1:
            self.switch.check(x, self.where)
            each = self.switch.each(len(x))
        for here, rows in found.items():
            indices = [row * each + n for row in rows for n in range(each)] if len(found) > 1 else list(range(len(x)))
            with self.acting_as(here) as acting:
                yield indices, acting

    def here(self, row: Row) -> Here:
        """Those deltas and factors of a row that sit here and do something."""
        deltas, factors = self.deltas, self.factors
        return tuple((n, weight) for n, weight in row.items() if weight != 0 and (n in factors or n in deltas))

    @contextmanager
    def acting_as(self, here: Here, tokens: str = "") -> Iterator[list[Acting]]:
        """These deltas. Inside, what they share with other sites knows which of them act together, and on which
        tokens."""
        acting = self.named(here)
        group = tuple(name if weight == 1 else f"{name} {weight}" for name, weight in here)
        group = (*group, tokens) if tokens else group
        deltas = [delta for delta, _ in acting if isinstance(delta, Delta)]
        shared = [delta.site.shared for delta in deltas if delta.site.shared is not None]
        for each in shared:
            each.group = group
        token = KNOWN.set(self.known if self.remembers else None)
        try:
            yield acting
        finally:  # a pass that fails leaves nothing to the next one
            KNOWN.reset(token)
            for each in shared:
                each.group = ()

    def routed(self, route: Route, x: Tensor, compute: Callable[[list[Acting], slice], Tensor]) -> Tensor:
        """`compute` of the tokens of x that have the same deltas here, for all of them, in order."""
        whole = slice(None)
        spans: list[tuple[int, int, Here]] = []
        for span in route.spans:
            here = self.here(span.row)
            if spans and spans[-1][2] == here:
                spans[-1] = (spans[-1][0], span.stop, here)
            else:
                spans.append((span.start, span.stop, here))
        if len(spans) == 1:
            with self.acting_as(spans[0][2]) as acting:
                return compute(acting, whole)
        parts = []
        for start, stop, here in spans:
            with self.acting_as(here) as acting:
                parts.append(compute(acting, slice(start, stop)))
        return torch.cat(parts, dim=route.token_dimension(x, self.where))

    @property
    def where(self) -> str:
        """The name of the site, or of one of its parts."""
        return next((d.site.name for d in self.deltas.values() if isinstance(d, Delta)), type(self).__name__)


SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim", "padding_idx")
"""What model code asks its layers beside weight and bias."""


class LayerHost(Host):
    def __init__(self, base: nn.Module, switch: Switch) -> None:
        super().__init__(switch)
        self.base = base
        made = view(base)
        assert made is not None, "attach() puts hosts on supported layers only"
        self.view: LinearBase = made
        self.bare: Callable[[Tensor], Tensor] = made
        """The frozen layer: the view, or what computes the same faster."""
        self.watch: Callable[[Tensor], Tensor] | None = None
        """Weight -> what code that reads it here gets in its place, while `probing.py` looks who reads it."""

    @property
    def weight(self) -> Tensor:
        """The frozen layer's own: models read its dtype or its device, and some scale it in place."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight if self.watch is None else self.watch(weight)

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.base, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def __getattr__(self, name: str) -> Any:
        if name in SIZES:
            return getattr(self.base, name)
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        if (route := ROUTE.get()) is not None:
            if self.view.kind == "linear" and not torch.is_grad_enabled():
                plan = self._plan(route)
                return self.bare(x) if plan is None else computed(plan, self, route, x)
            return self.routed(route, x, lambda acting, part: self.alone(acting, tokens_of(route, x, part, self.where)))
        if self.switch.rows is None:
            return self.alone(self.acting(), x)
        x = self.switch.for_each_row(x)
        return _in_order([(rows, self.alone(acting, x[rows])) for rows, acting in self.groups(x)])

    def _plan(self, route: Route) -> Plan | None:
        """How to compute the rows of a route; None where no delta of theirs sits here."""
        kept = self.known.get("plan") if self.remembers else None
        if kept is None or kept[0] is not route.rows:
            plan = plan_of([self.here(row) for row in route.rows.rows], self.view.d_out, self._parts)
            kept = route.rows, None if plan.is_base else plan
            if self.remembers:
                self.known["plan"] = kept
        found: Plan | None = kept[1]
        return found

    def _parts(self, here: Here) -> Parts:
        if (found := self.parts_of_factors.get(here)) is not None:
            return found

        def make() -> Parts:
            with self.acting_as(here) as acting:
                return parts_of(acting)

        made = cast("Parts", self._remembered(("parts", here), make))
        if self.remembers and all(name in self.factors for name, _ in here):
            self.parts_of_factors[here] = made
        return made

    def alone(self, acting: list[Acting], x: Tensor) -> Tensor:
        if not acting:
            return self.view(x)
        parts, factors = self._remembered(key_of(acting), partial(_prepared, acting))
        if parts.folded:
            y = self._fold(x, parts.folded)
        elif factors is not None:
            y = self.view.low_rank(x, *factors)
        else:
            y = self.view(x) if parts.takes_base else x.new_empty(0)
        return self.rest(parts, x, y)

    def rest(self, parts: Split, x: Tensor, y: Tensor) -> Tensor:
        """y, the layer's output with all changes that have factors or are folded, with the other changes made too."""
        for delta, share in parts.slow:
            change = self._increment(delta, dropped(x, delta)).to(y.dtype)
            if delta.offset_A is not None and delta.offset_B is not None:
                change = change - self.view.take(x, delta.offset_A.to(y.dtype)) @ delta.offset_B.to(y.dtype).T
            y = y + (change if share == 1 else share * change)
        for other, share in parts.others:
            with in_dtype_of(x):
                y = partly(y, other(dropped(x, other), y, self.view).to(y.dtype), share)
        return y

    def _fold(self, x: Tensor, acting: Sequence[tuple[Change, float]]) -> Tensor:
        first, share = acting[0]
        if len(acting) == 1 and isinstance(first, WeightDelta) and _is_fast(first):
            with in_dtype_of(x):  # a fast form of its own
                y: Tensor = first(x, x.new_empty(0), residual(first, self.view))
            y = y.to(x.dtype) if x.is_floating_point() else y
            return y if share == 1 else partly(self.view(x), y, share)
        W, b = self.view.weight, self.view.bias
        if not any(drops(d) for d, _ in acting):
            return self.view.apply(x, *self._remembered(("folded", *key_of(acting)), partial(self._folded, acting, x)))
        y = self.view(x)  # with dropout, what each delta changes acts on its own x, and the base on the whole of it
        for delta, share in acting:
            W_, b_ = folded_partly(delta, share, W, b)
            shift = None if b_ is None else b_ if b is None else b_ - b
            y = y + self.view.apply(dropped(x, delta) if isinstance(delta, Delta) else x, W_ - W, shift)
            W, b = W_, b_
        return y

    def _folded(self, acting: Sequence[tuple[Change, float]], like: Tensor) -> tuple[Tensor, Tensor | None]:
        """W and b with the deltas in them, in the dtype of the product where that is known."""
        W, b = self.view.weight, self.view.bias
        for delta, share in acting:
            W, b = folded_partly(delta, share, W, b)
        return W.to(like.dtype) if like.is_floating_point() and self.view.kind == "linear" else W, b

    def _remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        if not self.remembers:
            return make()
        if (found := self.known.get(key)) is None:
            found = self.known[key] = make()
        return found

    def _increment(self, delta: AdditiveDelta, x: Tensor) -> Tensor:
        if not has_own_increment(delta) and delta.factors() is None:
            return self.view.apply(x, self._remembered(id(delta), delta.matrix), None)
        with in_dtype_of(x):
            return delta.increment(x, self.view)

    def effective(self, W: Tensor | None = None, names: Sequence[str] | None = None) -> tuple[Tensor, Tensor | None]:
        """(W', b') in float32 with the active deltas (or `names`) folded in, in order; TargetError if one is not
        mergeable. Another W [d_out, d_in] may be given for the layer's own.
        """
        W, b = self.view.weight if W is None else W, self.view.bias
        for name in self.active if names is None else names:
            delta = self.deltas[name]
            if not isinstance(delta, WeightDelta):
                raise cannot_merge(name, delta)
            W, b = folded(delta, W, b)
        return W, b


def _prepared(acting: Sequence[Acting]) -> tuple[Split, tuple[Tensor, Tensor] | None]:
    """What acts by how it is computed, and (A, B) of all that have factors, as one operation."""
    parts = split(acting)
    return parts, as_one(parts.fast)


def _is_fast(delta: WeightDelta) -> bool:
    return type(delta).forward is not WeightDelta.forward and not drops(delta)


def cannot_merge(name: str, delta: nn.Module) -> TargetError:
    """The error for a delta that is no change of weights."""
    why = f": {delta.not_mergeable}" if isinstance(delta, Delta) and delta.not_mergeable else ""
    return TargetError(
        f"delta {name!r} ({type(delta).__name__}) is no change of weights: it cannot be merged{why}",
        code="not-mergeable",
    )


def _in_order(parts: list[tuple[list[int], Tensor]]) -> Tensor:
    """The rows of the parts in the order of their indices."""
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    together = torch.cat([part for _, part in parts])
    return together[order.to(together.device)]


class SubLayerBase:
    """What stands for a base where there is no single weight."""

    kind = "sublayer"

    def __init__(self, d: int) -> None:
        self.d_in = self.d_out = d


class SubLayerHost(Host):
    """A child of the sub-layer that it serves, called through a hook on it: arguments and outputs stay the model's."""

    def __init__(self, sublayer: nn.Module, d_model: int, switch: Switch) -> None:
        super().__init__(switch)
        self.view = SubLayerBase(d_model)
        self.hook = sublayer.register_forward_hook(self._after, with_kwargs=True)

    def _after(self, sublayer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        if (route := ROUTE.get()) is not None:
            tokens = partial(tokens_of, route, where=self.where)
            changed = self.routed(route, y, lambda acting, part: self._with(acting, tokens(x, part), tokens(y, part)))
        elif self.switch.rows is None:
            acting = self.acting()
            if not acting:
                return None
            changed = self._with(acting, x, y)
        else:
            changed = _in_order([(rows, self._with(acting, x[rows], y[rows])) for rows, acting in self.groups(y)])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _with(self, acting: list[Acting], x: Tensor, y: Tensor) -> Tensor:
        for delta, share in acting:
            assert isinstance(delta, Delta), "factors sit on layers"
            with in_dtype_of(y):
                y = partly(y, delta(dropped(x, delta), y, self.view).to(y.dtype), share)
        return y


class ModelHost(Host):
    """A child of the decoder. Before a pass it makes the keys and values that `prefix.attention` puts before each
    sequence's own, and moves the positions of the sequence behind them.

    A prompt is the same thing as a prefix whose keys and values the model itself computes from embeddings: nothing
    that comes later changes them. So one pass over the p embeddings serves all rows, packs and generated tokens.
    """

    def __init__(self, decoder: nn.Module, d_model: int, switch: Switch) -> None:
        super().__init__(switch)
        self.view = SubLayerBase(d_model)
        self.before: prefix.Stacked | None = None
        self._busy = False
        self.hook = decoder.register_forward_pre_hook(self._prepare, with_kwargs=True)

    def _prepare(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._busy or ROUTE.get() is not None:  # whoever gives a route puts keys and values before each request
            return None
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        assert given is not None
        combos = [self.active]
        if (rows := self.switch.rows) is not None:
            each = self.switch.each(len(given))
            combos = [tuple(name for name, weight in row.items() if weight) for row in rows for _ in range(each)]
        made: dict[tuple[str, ...], prefix.Before] = {}
        for combo in combos:
            if combo not in made:
                made[combo] = self.before_of(decoder, combo)
        self.before = prefix.stack([made[combo] for combo in combos])
        if self.before is None:
            return None
        shift = torch.tensor([made[combo].length for combo in combos], device=given.device)[:, None]
        kwargs["position_ids"] = shift + _positions(given, kwargs)
        return args, kwargs

    def before_of(self, decoder: Any, combo: tuple[str, ...]) -> "prefix.Before":
        """The keys and values of one combination of deltas: prefixes as they are, prompts by a pass over them."""
        found: list[Tensor] = []
        prompts: list[Tensor] = []
        for delta in self.on(combo):
            assert isinstance(delta, InputDelta)
            if (made := delta.prefix()) is not None:
                found.append(made)
            if (embeddings := delta.prompt()) is not None:
                prompts.append(embeddings)
        learnt = torch.cat(found, dim=3) if found else None
        if not prompts:
            return prefix.Before(learnt)
        weight = decoder.get_input_embeddings().weight
        embeddings = torch.cat(prompts)[None].to(weight.dtype)
        start = 0 if learnt is None else learnt.shape[3]
        positions = torch.arange(start, start + embeddings.shape[1], device=embeddings.device)[None]
        pack = LAYOUT.get()
        layout = None if pack is None else SegmentLayout([embeddings.shape[1]], attend=pack.attend)
        self._busy, kept, rows = True, self.before, self.switch.rows
        self.before = prefix.stack([prefix.Before(learnt)])
        self.switch.rows = None if rows is None else [dict.fromkeys(combo, 1.0)]
        try:
            with prefix.recording(decoder) as heard, use_layout(layout):
                decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        finally:
            self._busy, self.before, self.switch.rows = False, kept, rows
        return prefix.Before(learnt, torch.stack([torch.stack([k[0], v[0]]) for k, v in heard]))


def _positions(given: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The positions that the model would give to this call's tokens, [rows, tokens]."""
    if kwargs.get("position_ids") is not None:
        positions: Tensor = kwargs["position_ids"]
        return positions
    cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    past = 0 if cache is None else int(cache.get_seq_length())
    return torch.arange(past, past + given.shape[1], device=given.device)[None]
