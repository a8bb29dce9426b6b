"""Hosts: what stands in the model where deltas sit, and computes with those that are on.

    LayerHost     takes the place of a frozen layer (linear, embedding, norm) and holds it untouched
    SubLayerHost  beside an attention or feed-forward block: sees its input and changes its output
    ModelHost     beside the decoder: what every sequence attends to before itself

Dtype, dropout, the choice of the fast path, the order of several deltas and different deltas for the rows of a batch
live here, once. With no active delta a host does exactly what the base does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.deltas.base import AdditiveDelta, Delta, InputDelta, WeightDelta
from graftlm.errors import TargetError
from graftlm.kernels.attention import LAYOUT, SegmentLayout, use_layout
from graftlm.model.layers import prefix
from graftlm.model.layers.bases import LinearBase, Residual, view

CACHE_NAMES = ("cache", "past_key_values")
"""How transformers' decoders call the cache: from 5.24 on, and before."""


Row = Mapping[str, float]
"""What one row of a batch has: delta -> its weight, in the order in which they act."""

Acting = tuple[Delta, float]
"""A delta, and the share of its change that is made: 1 for all of it."""


class Switch:
    """One for each model, known to all its hosts: which deltas act on which row of a batch, where rows differ."""

    def __init__(self) -> None:
        self.rows: list[Row] | None = None
        self.passes: list[tuple[int, int] | None] = []
        """(rows, tokens) of the batch of each pass that is going on, the outermost first; None where it is unknown."""

    def begin(self, given: Tensor | None) -> None:
        """A pass begins over ids [rows, tokens] or embeddings [rows, tokens, d]."""
        self.passes.append(None if given is None else (given.shape[0], given.shape[1]))
        if given is not None:
            self.each(len(given))

    def end(self) -> None:
        if self.passes:
            self.passes.pop()

    def each(self, count: int) -> int:
        """How many of `count` rows, or of their tokens, lie one behind the other for each row that was named.

        Generation repeats a row for its beams and for several answers. Some blocks lay the tokens of all rows end to
        end. Either way, what belongs to a row stays together.
        """
        assert self.rows is not None
        if count % len(self.rows):
            raise TargetError(
                f"deltas were given for {len(self.rows)} rows, the batch has {count}", code="row-count-mismatch"
            )
        return count // len(self.rows)

    def for_each_row(self, x: Tensor) -> Tensor:
        """x, repeated where the model makes one for all rows, as it does of positions [1, tokens]."""
        rows = self.passes[-1][0] if self.passes and self.passes[-1] else 1
        return x.expand(rows, *x.shape[1:]) if len(x) == 1 and not x.is_floating_point() else x

    def check(self, x: Tensor, where: str) -> None:
        """Refuse an x whose rows cannot be told from its shape: [rows, ..] or, laid end to end, [rows * tokens, d]."""
        if not self.passes or self.passes[-1] is None:
            return
        rows, tokens = self.passes[-1]
        laid_out = x.dim() == 2 and x.is_floating_point()
        if len(x) != rows and not (laid_out and len(x) == rows * tokens):
            raise TargetError(
                f"{where} gets {len(x)} {'vectors' if laid_out else 'rows'} of a batch of {rows} rows of {tokens} "
                "tokens, so it cannot be told which belong to which row (a router may have chosen them). Run the rows "
                "one by one, or give them all the same deltas",
                code="rows-not-separable",
            )


class Host(nn.Module):
    """The deltas at one site by name, and those of them that are on, in the order in which they act."""

    def __init__(self, switch: Switch) -> None:
        super().__init__()
        self.deltas = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.switch = switch

    def on(self, names: Sequence[str] | None = None) -> list[Delta]:
        """The active deltas (or those of `names` that sit here), in order."""
        chosen = self.active if names is None else [name for name in names if name in self.deltas]
        return [d for name in chosen if isinstance(d := self.deltas[name], Delta)]

    def acting(self) -> list[Acting]:
        """The active deltas, each with the whole of its change."""
        return [(delta, 1.0) for delta in self.on()]

    def groups(self, x: Tensor) -> Iterator[tuple[list[int], list[Acting]]]:
        """What of x has the same deltas here with the same weights, together: (indices along x's first dimension,
        deltas)."""
        wanted = self.switch.rows
        assert wanted is not None
        found: dict[tuple[tuple[str, float], ...], list[int]] = {}
        for row, weights in enumerate(wanted):
            here = tuple((name, weight) for name, weight in weights.items() if name in self.deltas and weight != 0)
            found.setdefault(here, []).append(row)
        each = 1
        if len(found) > 1:
            self.switch.check(x, self.where)
            each = self.switch.each(len(x))
        for here, rows in found.items():
            indices = [row * each + n for row in rows for n in range(each)] if len(found) > 1 else list(range(len(x)))
            acting = list(zip(self.on([name for name, _ in here]), (weight for _, weight in here), strict=True))
            group = tuple(name if weight == 1 else f"{name} {weight}" for name, weight in here)
            for delta, _ in acting:
                if delta.site.shared is not None:
                    delta.site.shared.group = group
            yield indices, acting
            for delta, _ in acting:
                if delta.site.shared is not None:
                    delta.site.shared.group = ()

    @property
    def where(self) -> str:
        """The name of the site, or of one of its parts."""
        return next((d.site.name for d in self.deltas.values() if isinstance(d, Delta)), type(self).__name__)


def drops(delta: Delta) -> bool:
    return delta.training and delta.config.dropout > 0


def _dropped(x: Tensor, delta: Delta) -> Tensor:
    return F.dropout(x, delta.config.dropout, training=drops(delta)) if x.is_floating_point() else x


def _in_dtype_of(x: Tensor) -> Any:
    """Inside, float32 parameters multiply x in its own precision, as the frozen layers do."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(x.device.type, dtype=x.dtype) if half else nullcontext()


def _partly(y: Tensor, changed: Tensor, share: float) -> Tensor:
    """y with a share of the change that a delta made of it."""
    return changed if share == 1 else y + share * (changed - y)


def residual(delta: Delta, base: Any) -> Any:
    """The base as this delta sees it: less its offset, where an init took one from W."""
    if delta.offset_A is None or delta.offset_B is None:
        return base
    return Residual(base, delta.offset_A, delta.offset_B)


def folded(delta: WeightDelta, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(W', b') of a delta with its offset, in float32."""
    if delta.offset_A is not None and delta.offset_B is not None:
        W = W - delta.offset_B @ delta.offset_A
    return delta.effective(W, b)


def _folded_partly(delta: WeightDelta, share: float, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W and b with a share of what a delta makes of them."""
    W_, b_ = folded(delta, W, b)
    if share == 1:
        return W_, b_
    before = torch.zeros_like(b_) if b is None and b_ is not None else b
    return W + share * (W_ - W), None if b_ is None or before is None else _partly(before, b_, share)


def all_factors(delta: AdditiveDelta) -> tuple[Tensor, Tensor] | None:
    """(A, B) of a delta with its offset: what it adds to the untouched base, exactly; None where it has no factors."""
    factors = delta.factors()
    if factors is None or delta.offset_A is None or delta.offset_B is None:
        return factors
    return torch.cat([factors[0], delta.offset_A]), torch.cat([factors[1], -delta.offset_B], dim=1)


SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim", "padding_idx")
"""What model code asks its layers beside weight and bias."""


class LayerHost(Host):
    def __init__(self, base: nn.Module, switch: Switch) -> None:
        super().__init__(switch)
        self.base = base
        made = view(base)
        assert made is not None, "attach() puts hosts on supported layers only"
        self.view: LinearBase = made
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
        if self.switch.rows is None:
            return self._with(self.acting(), x)
        x = self.switch.for_each_row(x)
        return _in_order([(rows, self._with(acting, x[rows])) for rows, acting in self.groups(x)])

    def _with(self, acting: list[Acting], x: Tensor) -> Tensor:
        if not acting:
            return self.view(x)
        # A change of weights acts on the frozen layer, any other delta on an output: so changes of weights come first.
        weights = [(d, share) for d, share in acting if isinstance(d, WeightDelta)]
        others = [(d, share) for d, share in acting if not isinstance(d, WeightDelta)]
        if not weights:
            y = self.view(x) if others[0][0].wants_y or others[0][1] != 1 else x.new_empty(0)
        elif all(isinstance(d, AdditiveDelta) for d, _ in weights):
            y = self._add(x, [(d, share) for d, share in weights if isinstance(d, AdditiveDelta)])
        else:
            y = self._fold(x, weights)
        for delta, share in others:
            with _in_dtype_of(x):
                y = _partly(y, delta(_dropped(x, delta), y, self.view).to(y.dtype), share)
        return y

    def _fold(self, x: Tensor, acting: Sequence[tuple[WeightDelta, float]]) -> Tensor:
        first, share = acting[0]
        if len(acting) == 1 and type(first).forward is not WeightDelta.forward and not drops(first):
            with _in_dtype_of(x):  # a fast form of its own
                y: Tensor = first(x, x.new_empty(0), residual(first, self.view))
            y = y.to(x.dtype) if x.is_floating_point() else y
            return y if share == 1 else _partly(self.view(x), y, share)
        W, b = self.view.weight, self.view.bias
        if not any(drops(d) for d, _ in acting):
            for delta, share in acting:
                W, b = _folded_partly(delta, share, W, b)
            return self.view.apply(x, W, b)
        y = self.view(x)  # with dropout, what each delta changes acts on its own x, and the base on the whole of it
        for delta, share in acting:
            W_, b_ = _folded_partly(delta, share, W, b)
            shift = None if b_ is None else b_ if b is None else b_ - b
            y = y + self.view.apply(_dropped(x, delta), W_ - W, shift)
            W, b = W_, b_
        return y

    def _add(self, x: Tensor, acting: Sequence[tuple[AdditiveDelta, float]]) -> Tensor:
        fast: list[tuple[Tensor, Tensor]] = []
        slow: list[tuple[AdditiveDelta, float]] = []
        for delta, share in acting:
            factors = None if drops(delta) or _has_own_increment(delta) else all_factors(delta)
            if factors is None:
                slow.append((delta, share))
            else:
                fast.append(factors if share == 1 else (factors[0], share * factors[1]))
        if fast:  # one operation, however many deltas there are
            A = torch.cat([a for a, _ in fast]) if len(fast) > 1 else fast[0][0]
            B = torch.cat([b for _, b in fast], dim=1) if len(fast) > 1 else fast[0][1]
            y = self.view.low_rank(x, A, B)
        else:
            y = self.view(x)
        for delta, share in slow:
            change = self._increment(delta, _dropped(x, delta)).to(y.dtype)
            if delta.offset_A is not None and delta.offset_B is not None:
                change = change - self.view.take(x, delta.offset_A.to(y.dtype)) @ delta.offset_B.to(y.dtype).T
            y = y + (change if share == 1 else share * change)
        return y

    def _increment(self, delta: AdditiveDelta, x: Tensor) -> Tensor:
        if not _has_own_increment(delta) and delta.factors() is None:
            return self.view.apply(x, delta.matrix(), None)
        with _in_dtype_of(x):
            return delta.increment(x, self.view)

    def effective(self, W: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(W', b') in float32 with the active deltas folded in, in order; TargetError if one is not mergeable.

        Another W [d_out, d_in] may be given for the layer's own.
        """
        W, b = self.view.weight if W is None else W, self.view.bias
        for name in self.active:
            delta = self.deltas[name]
            if not isinstance(delta, WeightDelta):
                raise _cannot_merge(name, delta)
            W, b = folded(delta, W, b)
        return W, b


def _has_own_increment(delta: AdditiveDelta) -> bool:
    return type(delta).increment is not AdditiveDelta.increment


def _cannot_merge(name: str, delta: nn.Module) -> TargetError:
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
        if self.switch.rows is None:
            acting = self.acting()
            if not acting:
                return None
            changed = self._with(acting, x, y)
        else:
            changed = _in_order([(rows, self._with(acting, x[rows], y[rows])) for rows, acting in self.groups(y)])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _with(self, acting: list[Acting], x: Tensor, y: Tensor) -> Tensor:
        for delta, share in acting:
            with _in_dtype_of(y):
                y = _partly(y, delta(_dropped(x, delta), y, self.view).to(y.dtype), share)
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
        if self._busy:
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
                made[combo] = self._before(decoder, self.on(combo), combo)
        self.before = prefix.stack([made[combo] for combo in combos])
        if self.before is None:
            return None
        shift = torch.tensor([made[combo].length for combo in combos], device=given.device)[:, None]
        kwargs["position_ids"] = shift + _positions(given, kwargs)
        return args, kwargs

    def _before(self, decoder: Any, deltas: list[Delta], combo: tuple[str, ...]) -> "prefix.Before":
        """The keys and values of one combination of deltas: prefixes as they are, prompts by a pass over them."""
        found: list[Tensor] = []
        prompts: list[Tensor] = []
        for delta in deltas:
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
