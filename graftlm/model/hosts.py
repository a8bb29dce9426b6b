"""Hosts: what stands in the model where deltas sit, and computes with those that are on.

    LayerHost     takes the place of a frozen layer (linear, embedding, norm) and holds it untouched
    SubLayerHost  beside an attention or feed-forward block: sees its input and changes its output
    ModelHost     beside the decoder: what every sequence attends to before itself

Dtype, dropout, the choice of the fast path, the order of several deltas and different deltas for the rows of a batch
live here, once. With no active delta a host does exactly what the base does.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.deltas.base import AdditiveDelta, Delta, InputDelta, WeightDelta
from graftlm.errors import TargetError
from graftlm.model import prefix
from graftlm.model.bases import LinearBase, Residual, view
from graftlm.model.ops import PLAN, Plan, planned

CACHE_NAMES = ("cache", "past_key_values")
"""How transformers' decoders call the cache: from 5.24 on, and before."""


class Switch:
    """One for each model, known to all its hosts: which deltas act on which row of a batch, where rows differ."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] | None = None


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

    def groups(self, rows: int) -> Iterator[tuple[list[int], list[Delta]]]:
        """The rows of a batch that have the same deltas here, together: (indices, deltas)."""
        wanted = self.switch.rows
        assert wanted is not None
        if len(wanted) != rows:
            raise TargetError(f"deltas were given for {len(wanted)} rows, the batch has {rows}")
        found: dict[tuple[str, ...], list[int]] = {}
        for row, names in enumerate(wanted):
            found.setdefault(tuple(n for n in names if n in self.deltas), []).append(row)
        for names, indices in found.items():
            deltas = self.on(names)
            for delta in deltas:
                if delta.site.shared is not None:
                    delta.site.shared.group = names
            yield indices, deltas
            for delta in deltas:
                if delta.site.shared is not None:
                    delta.site.shared.group = ()


def drops(delta: Delta) -> bool:
    return delta.training and delta.config.dropout > 0


def _dropped(x: Tensor, delta: Delta) -> Tensor:
    return F.dropout(x, delta.config.dropout, training=drops(delta)) if x.is_floating_point() else x


def _in_dtype_of(x: Tensor) -> Any:
    """Inside, float32 parameters multiply x in its own precision, as the frozen layers do."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(x.device.type, dtype=x.dtype) if half else nullcontext()


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


def all_factors(delta: AdditiveDelta) -> tuple[Tensor, Tensor] | None:
    """(A, B) of a delta with its offset: what it adds to the untouched base, exactly; None where it has no factors."""
    factors = delta.factors()
    if factors is None or delta.offset_A is None or delta.offset_B is None:
        return factors
    return torch.cat([factors[0], delta.offset_A]), torch.cat([factors[1], -delta.offset_B], dim=1)


class LayerHost(Host):
    def __init__(self, base: nn.Module, switch: Switch) -> None:
        super().__init__(switch)
        self.base = base
        made = view(base)
        assert made is not None, "attach() puts hosts on supported layers only"
        self.view: LinearBase = made

    def forward(self, x: Tensor) -> Tensor:
        if self.switch.rows is None:
            return self._with(self.on(), x)
        return _in_order([(rows, self._with(deltas, x[rows])) for rows, deltas in self.groups(len(x))])

    def _with(self, deltas: list[Delta], x: Tensor) -> Tensor:
        if not deltas:
            return self.view(x)
        # A change of weights acts on the frozen layer, any other delta on an output: so changes of weights come first.
        weights = [d for d in deltas if isinstance(d, WeightDelta)]
        others = [d for d in deltas if not isinstance(d, WeightDelta)]
        if not weights:
            y = self.view(x) if others[0].wants_y else x.new_empty(0)
        elif all(isinstance(d, AdditiveDelta) for d in weights):
            y = self._add(x, [d for d in weights if isinstance(d, AdditiveDelta)])
        else:
            y = self._fold(x, weights)
        for delta in others:
            with _in_dtype_of(x):
                y = delta(_dropped(x, delta), y, self.view).to(y.dtype)
        return y

    def _fold(self, x: Tensor, deltas: Sequence[WeightDelta]) -> Tensor:
        if len(deltas) == 1 and type(deltas[0]).forward is not WeightDelta.forward and not drops(deltas[0]):
            with _in_dtype_of(x):  # a fast form of its own
                y: Tensor = deltas[0](x, x.new_empty(0), residual(deltas[0], self.view))
            return y.to(x.dtype) if x.is_floating_point() else y
        W, b = self.view.weight, self.view.bias
        if not any(drops(d) for d in deltas):
            for delta in deltas:
                W, b = folded(delta, W, b)
            return self.view.apply(x, W, b)
        y = self.view(x)  # with dropout, what each delta changes acts on its own x, and the base on the whole of it
        for delta in deltas:
            W_, b_ = folded(delta, W, b)
            shift = None if b_ is None else b_ if b is None else b_ - b
            y = y + self.view.apply(_dropped(x, delta), W_ - W, shift)
            W, b = W_, b_
        return y

    def _add(self, x: Tensor, deltas: Sequence[AdditiveDelta]) -> Tensor:
        fast, slow = [], []
        for delta in deltas:
            factors = None if drops(delta) or _has_own_increment(delta) else all_factors(delta)
            slow.append(delta) if factors is None else fast.append(factors)
        if fast:  # one operation, however many deltas there are
            A = torch.cat([a for a, _ in fast]) if len(fast) > 1 else fast[0][0]
            B = torch.cat([b for _, b in fast], dim=1) if len(fast) > 1 else fast[0][1]
            y = self.view.low_rank(x, A, B)
        else:
            y = self.view(x)
        for delta in slow:
            y = y + self._increment(delta, _dropped(x, delta)).to(y.dtype)
            if delta.offset_A is not None and delta.offset_B is not None:
                y = y - self.view.take(x, delta.offset_A.to(y.dtype)) @ delta.offset_B.to(y.dtype).T
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
    return TargetError(f"delta {name!r} ({type(delta).__name__}) is no change of weights: it cannot be merged{why}")


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
            deltas = self.on()
            if not deltas:
                return None
            changed = self._with(deltas, x, y)
        else:
            changed = _in_order([(rows, self._with(deltas, x[rows], y[rows])) for rows, deltas in self.groups(len(y))])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _with(self, deltas: list[Delta], x: Tensor, y: Tensor) -> Tensor:
        for delta in deltas:
            with _in_dtype_of(y):
                y = delta(_dropped(x, delta), y, self.view).to(y.dtype)
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
        combos = [self.active] if self.switch.rows is None else list(self.switch.rows)
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
        pack = PLAN.get()
        plan = None if pack is None else Plan([embeddings.shape[1]], attend=pack.attend)
        self._busy, kept, rows = True, self.before, self.switch.rows
        self.before, self.switch.rows = prefix.stack([prefix.Before(learnt)]), None if rows is None else [combo]
        try:
            with prefix.recording(decoder) as heard, planned(plan):
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
