"""Parts of fused projections: q, k and v of `c_attn` or `qkv_proj`, gate and up of `gate_up_proj`.

A part is some of a layer's output rows. Which ones is asked of the model: a pass over a few tokens, and the gradients
from queries, keys, values and the input of the activation back to the layer's output. So no table of architectures is
needed, and rows that lie in turns, head by head, are found like any others.

On a layer the parts of one delta are one delta: what each makes of its rows of W, and nothing of the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from graftlm.deltas.base import AdditiveDelta, Delta, DeltaConfig, Rows, Site, WeightDelta
from graftlm.errors import TargetError
from graftlm.model.acting import all_factors, folded
from graftlm.model.attention import attending_by
from graftlm.model.bases import view
from graftlm.model.hosts import Host, LayerHost
from graftlm.model.probing import is_absent, of_any_layer, run

ATTENTION = ("q", "k", "v")
FEED_FORWARD = ("gate", "up")
PARTS = (*ATTENTION, *FEED_FORWARD)
NAME = "graft_parts"


def candidates(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What the parts of these layers would be called -> (layer, part)."""
    return {f"{name}.{part}": (name, part) for name in names for part in PARTS}


# On a layer ------------------------------------------------------------------------------------------------------


class PartsOfWeights(WeightDelta):
    """W'[rows of a part] = what the part's delta makes of W[rows], for each part; other rows stay."""

    family, paper, formula = "", "", ""

    def __init__(self, site: Site, config: DeltaConfig, parts: Mapping[str, WeightDelta]) -> None:
        super().__init__(site, config)
        self.parts = nn.ModuleDict(parts)

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        W, shift = W.clone(), None if b is None else b.clone()
        for part in _within(self):
            assert isinstance(part, WeightDelta)
            rows = indices(part.site, W)
            W_, b_ = folded(part, W[rows], None if b is None else b[rows])
            W = W.index_copy(0, rows, W_)
            if b_ is not None:
                shift = (W.new_zeros(len(W)) if shift is None else shift).index_copy(0, rows, b_)
        return W, shift

    def penalty(self) -> Tensor | None:
        return _penalty(self)


class PartsOfFactors(AdditiveDelta):
    """The same where each part adds to its rows: dW is zero in all others, and so is B where there are factors."""

    family, paper, formula = "", "", ""

    def __init__(self, site: Site, config: DeltaConfig, parts: Mapping[str, AdditiveDelta]) -> None:
        super().__init__(site, config)
        self.parts = nn.ModuleDict(parts)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        found = []
        for part in _within(self):
            assert isinstance(part, AdditiveDelta)
            factors = all_factors(part)
            if factors is None:
                return None
            A, B = factors
            padded = B.new_zeros(self.site.d_out, B.shape[1]).index_copy(0, indices(part.site, B), B)
            found.append((A, padded))
        return torch.cat([A for A, _ in found]), torch.cat([B for _, B in found], dim=1)

    def matrix(self) -> Tensor:
        dW: Tensor | None = None
        for part in _within(self):
            assert isinstance(part, AdditiveDelta)
            change = part.matrix()
            if part.offset_A is not None and part.offset_B is not None:
                change = change - part.offset_B @ part.offset_A
            dW = change.new_zeros(self.site.d_out, self.site.d_in) if dW is None else dW
            dW = dW.index_copy(0, indices(part.site, change), change)
        assert dW is not None
        return dW

    def penalty(self) -> Tensor | None:
        return _penalty(self)


def together(site: Site, config: DeltaConfig, parts: Mapping[str, Delta]) -> Delta:
    """The deltas of a layer's parts as one delta on the layer; TargetError where that has no meaning."""
    odd = next((delta for delta in parts.values() if not isinstance(delta, WeightDelta)), None)
    if odd is not None:
        raise TargetError(
            f"{odd.site.name}: {config.method!r} acts on the output of a layer, and a part of one has none of its own. "
            f"Target the whole layer, {site.name}",
            code="part-not-supported",
        )
    if len({delta.config.dropout for delta in parts.values()}) > 1:
        raise TargetError(
            f"{site.name}: its parts get one x, so they cannot have different dropout", code="parts-differ-in-dropout"
        )
    first = next(iter(parts.values())).config
    if all(isinstance(delta, AdditiveDelta) for delta in parts.values()):
        return PartsOfFactors(site, first, parts)  # type: ignore[arg-type]
    return PartsOfWeights(site, first, parts)  # type: ignore[arg-type]


def expanded(site: str, delta: nn.Module) -> Iterator[tuple[str, Delta]]:
    """(site, delta) of a delta in a host: itself, or each of its parts."""
    assert isinstance(delta, Delta)
    if isinstance(delta, PartsOfWeights | PartsOfFactors):
        yield from ((part.site.name, part) for part in _within(delta))
    else:
        yield site, delta


def _within(delta: PartsOfWeights | PartsOfFactors) -> Iterator[Delta]:
    return (part for part in delta.parts.values() if isinstance(part, Delta))


def _penalty(delta: PartsOfWeights | PartsOfFactors) -> Tensor | None:
    found = [p for part in _within(delta) if (p := part.penalty()) is not None]
    return torch.stack(found).sum() if found else None


def indices(site: Site, like: Tensor) -> Tensor:
    """The numbers of the rows of a part, int64, ascending."""
    assert site.rows is not None
    return torch.cat([torch.arange(a, b, device=like.device) for a, b in site.rows])


# Found in a model ------------------------------------------------------------------------------------------------


def find(model: Any, places: Mapping[str, tuple[str, str]], layers: Mapping[str, nn.Module]) -> dict[str, Rows]:
    """The rows of those of the wanted parts (name -> layer and part) that are there. `layers`: those of the decoder."""
    found = _rows_by_layer(model, list(dict.fromkeys(layer for layer, _ in places.values())), layers)
    there = {name: found[layer].get(part) for name, (layer, part) in places.items()}
    return {name: rows for name, rows in there.items() if rows is not None}


def why_not(model: Any, name: str, layer: str, layers: Mapping[str, nn.Module]) -> str:
    """The error text for a part that a layer does not have."""
    parts = _rows_by_layer(model, [layer], layers)[layer]
    has = f"its parts are {', '.join(parts)}" if parts else "no parts of it can be told apart"
    return (
        f"targets: {name!r}: {layer} has no such part: {has}. q, k and v are found where attention goes through "
        "transformers' interface, gate and up where one half of a layer goes through an activation. Target the whole "
        f"layer, {layer.rpartition('.')[2]!r}"
    )


def _rows_by_layer(model: Any, names: Sequence[str], layers: Mapping[str, nn.Module]) -> dict[str, dict[str, Rows]]:
    """Layer -> part -> rows. The answers are kept with the model, of layers that a pass reaches."""
    rows: dict[str, dict[str, Rows]] = model.__dict__.setdefault(NAME, {})
    unknown = [name for name in names if name not in rows]
    if not unknown:
        return rows
    watched = {name: _Output(model.get_submodule(name)) for name in unknown}
    with ExitStack() as stack, torch.enable_grad():
        for name, output in watched.items():
            parent = model.get_submodule(name.rpartition(".")[0])
            stack.callback(output.layer.register_forward_hook(output.replaced).remove)
            stack.callback(parent.register_forward_hook(output.finished).remove)
            for child in parent.children():
                if _may_activate(child):
                    stack.callback(child.register_forward_pre_hook(output.activated).remove)
        stack.enter_context(_activations_shown(model, watched.values()))
        run(model, layers)
    rows.update({name: output.parts() for name, output in watched.items() if output.y is not None})
    like = {(of_any_layer(name), _width(model, name)): parts for name, parts in rows.items() if parts}
    for name in unknown:
        if is_absent(model, name):
            rows[name] = like.get((of_any_layer(name), _width(model, name)), {})
    return {name: {} for name in names} | rows


def _width(model: nn.Module, name: str) -> int:
    module = model.get_submodule(name)
    base = view(module.base if isinstance(module, LayerHost) else module)
    return base.d_out if base else 0


def _may_activate(module: nn.Module) -> bool:
    """Whether a module may be the activation of a feed-forward block: it has no weights, and does something."""
    if isinstance(module, Host | nn.Dropout | nn.Identity) or view(module) is not None:
        return False
    return next(module.parameters(), None) is None


class _Output:
    """The output of one layer in the pass, and what was made of which of its rows."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.y: Tensor | None = None
        self.reached: dict[str, Tensor] = {}
        """Part -> whether each row reaches it."""

    def replaced(self, layer: nn.Module, args: Any, y: Tensor) -> Tensor:
        self.y = y.detach().float().requires_grad_()
        return self.y.to(y.dtype).clone()

    def activated(self, activation: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self.note("gate", args[0])

    def finished(self, parent: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if "gate" in self.reached and isinstance(output, Tensor):
            self.note("all", output)

    def note(self, part: str, tensor: Tensor) -> None:
        if self.y is None or not tensor.requires_grad:
            return
        numbers = torch.linspace(1, 2, tensor.numel(), device=tensor.device).mul(40).sin().view(tensor.shape)
        (gradient,) = torch.autograd.grad(
            (tensor.float() * numbers).sum(), self.y, retain_graph=True, allow_unused=True
        )
        if gradient is not None:
            reached = gradient.reshape(-1, gradient.shape[-1]).ne(0).any(0)
            self.reached[part] = self.reached.get(part, torch.zeros_like(reached)) | reached

    def parts(self) -> dict[str, Rows]:
        """The parts that have rows of their own: all q, k and v that there are, or gate and up."""
        found = {part: self.reached[part] for part in ATTENTION if part in self.reached}
        if not found and "all" in self.reached:  # an activation may be 0, which hides some rows of the other half
            found = {"gate": self.reached["gate"], "up": ~self.reached["gate"]}
        shared = sum(rows.int() for rows in found.values())
        if not isinstance(shared, Tensor) or bool((shared > 1).any()) or not all(r.any() for r in found.values()):
            return {}
        return {part: _ranges(rows) for part, rows in found.items() if not rows.all()}


def _ranges(rows: Tensor) -> Rows:
    """Where a mask [n] is true, as ranges (start, stop)."""
    edges = torch.diff(rows.int(), prepend=rows.new_zeros(1).int(), append=rows.new_zeros(1).int()).nonzero()[:, 0]
    return tuple((int(a), int(b)) for a, b in edges.view(-1, 2))


@contextmanager
def _activations_shown(model: Any, outputs: Any) -> Iterator[None]:
    """Inside, attention passes its queries, keys and values to the `_Output`s of the layers in its module."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
        inside = {id(m) for m in module.modules()}
        for output in outputs:
            if id(output.layer) in inside:
                for part, tensor in zip(ATTENTION, (query, key, value), strict=True):
                    output.note(part, tensor)
        return sdpa_attention_forward(module, query, key, value, mask, **settings)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    with attending_by(model, NAME):
        yield
