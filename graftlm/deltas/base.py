"""What a method is: the faces of one equation, and all that it may know about its place.

    Delta.forward(x, y, base) -> y'          x [.. d_in], y = base(x) [.. d_out]
     |- WeightDelta.effective(W, b)          -> (W', b'): mergeable
     |   |- AroundDelta.input(x), .output(z) -> y' = output(base(input(x))): a single product with W
     |   `- AdditiveDelta.matrix()           -> dW with W' = W + dW
     |       .factors()                      -> (A, B) with dW = B A exactly, scale folded in, or None
     `- InputDelta.prompt() / .prefix()      what every sequence sees in front of it

A method file overrides the most special face that its equation has and nothing else; the others are derived here. A
faster form of the same equation may stand beside it (`increment`, `forward` of a WeightDelta): the contract compares.
Tensors are float32 and dense: dtype, device, quantizer and dropout are the plumbing's (`graftlm/model/`).
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Concatenate, ParamSpec, Protocol, TypeVar, final

import torch
from torch import Tensor, nn

from graftlm.config.schema import Share, config
from graftlm.errors import TargetError

Targets = str | tuple[str, ...]

KNOWN: ContextVar[dict[Any, Any] | None] = ContextVar("graft_known", default=None)
"""During answers: what `once` has computed. Whoever sets it empties it as soon as a delta may have learnt."""

Result = TypeVar("Result")
Computed = TypeVar("Computed", bound="Delta")
Given = ParamSpec("Given")


def once(method: Callable[Concatenate[Computed, Given], Result]) -> Callable[Concatenate[Computed, Given], Result]:
    """For a method that reads the delta's parameters and the frozen base, and nothing else: during answers it is
    computed once."""

    @functools.wraps(method)
    def found(self: Computed, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        known = KNOWN.get()
        if known is None:
            return method(self, *args, **kwargs)
        key = id(self), method.__name__
        if key not in known:
            known[key] = method(self, *args, **kwargs)
        result: Result = known[key]
        return result

    return found


Rows = tuple[tuple[int, int], ...]
"""Some of the output rows of a layer, as ranges (start, stop) in ascending order."""


def _no_original() -> Tensor:
    raise TargetError("there is no weight here that was quantized", code="layer-not-quantized")


@dataclass(frozen=True)
class Site:
    """A place in the model where a delta sits.

    `weight()` is W, float32 [d_out, d_in], or None at a sub-layer and a block; [d] at a norm; the embeddings'
    [d_model, vocabulary] at the model. `rows` are those of the layer that a part of a fused projection is: `weight`,
    `bias` and `d_out` are then the part's. `expert=e` is one expert of a fused stack. `seed` differs from site to site
    and is the same in every run.
    """

    name: str
    d_in: int
    d_out: int
    weight: Callable[[], Tensor | None]
    seed: int
    kind: str = "linear"
    """linear, embedding, norm, sublayer, block (a transformer layer) or model"""
    has_bias: bool = False
    bias: Callable[[], Tensor | None] = lambda: None
    """b, float32 [d_out], or None."""
    original: Callable[[], Tensor] = _no_original
    """W before the base was quantized, float32 [d_out, d_in], read from its files; TargetError where there is none."""
    tied: bool = False
    """Whether the output head has the same weight."""
    layer: int | None = None
    """The number of the transformer layer that it lies in, None outside of all."""
    rows: Rows | None = None
    expert: int | None = None
    heads: tuple[int, int, int] | None = None
    """At the model: (layers, key/value heads, size of a head)."""
    shared: "Shared | None" = None
    """What `DeltaConfig.share` made for all sites. Deltas hold it through here, so no state dict repeats it."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """What was gathered for `Delta.needs` or an init: `gradient` and `fisher` [d_out, d_in], `second_moment` [d_in,
    d_in]."""

    def generator(self) -> torch.Generator:
        """Random numbers that depend on the run's seed and on this site's name alone."""
        return torch.Generator().manual_seed(self.seed)

    def W(self) -> Tensor:
        """`weight()` where there must be one."""
        weight = self.weight()
        assert weight is not None, f"{self.name} is no layer with a weight"
        return weight


def check_divides(number: int, name: str, site: Site) -> None:
    """Raise TargetError if `number`, called `name` ("METHOD: FIELD"), does not divide the sizes of a layer."""
    if site.d_in % number or site.d_out % number:
        raise TargetError(
            f"{name} is {number}, which does not divide the {site.d_in} inputs and {site.d_out} outputs of "
            f"{site.name}: choose a number that divides both, by `patterns` if it is to differ there",
            code="indivisible-layer",
        )


class Shared(nn.Module):
    """What all sites of a delta hold in common. A tape of activations must keep the groups of rows apart."""

    group: tuple[str, ...] = ()
    """While a site computes: the deltas of the rows that it computes for, where rows differ."""


class Base(Protocol):
    """A view of a frozen layer of any kind (linear, transposed, quantized ...), made by `model/bases.py`."""

    @property
    def weight(self) -> Tensor:
        """W as float32 [d_out, d_in]."""

    @property
    def bias(self) -> Tensor | None:
        """b as float32 [d_out], or None."""

    def __call__(self, x: Tensor) -> Tensor:
        """The frozen layer itself: x [.. d_in] -> [.. d_out]."""

    def apply(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """What the layer would return with these weights: x W^T + b."""

    def take(self, x: Tensor, A: Tensor) -> Tensor:
        """x A^T for A [r, d_in] (a look-up, where the layer is an embedding)."""

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, gain: Tensor | None = None) -> Tensor:
        """gain * x (W + B A)^T + b in one operation: A [r, d_in], B [d_out, r], gain [d_out]."""

    def product(self, A: Tensor) -> Tensor:
        """W A^T [d_out, r], float32, without a float copy of W."""

    def row_norms(self, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
        """||W + B A|| of each row, float32 [d_out], without a product over all of W and without a gradient."""


@config
class DeltaConfig:
    """What every method has: where it sits, how it starts, and what differs from place to place."""

    method: str
    init: str = "zero"
    targets: Targets = "all-linear"
    """`all-linear` (every linear layer of the decoder but the output head), `all-norms`, `all-embeddings`,
    `all-attention`, `all-mlp`, `all-sublayers`, `all-blocks`, `all`, a regular expression for the whole name, or
    suffixes. A part of a fused projection has the layer's name and its own: `c_attn.q`, `qkv_proj.v`,
    `gate_up_proj.gate`."""
    dropout: Share = 0.0
    """Probability of zeroing an element of x on its way into the delta (the base always sees the whole x)."""
    patterns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Regular expression for the end of a site's name -> fields that are different there. The first match counts."""

    def at(self, **overrides: Any) -> "DeltaConfig":
        """This config with other values for some fields; used for the sites of one pattern."""
        return replace(self, **overrides)

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Which of the targeted sites (in the model's order) the method takes; by default all of them."""
        return sites

    def share(self, sites: Sequence[Site]) -> "Shared | None":
        """What all sites hold in common (projections, a vector bank, a tape), or None; registered once, at the root."""
        return None


def matches(targets: Targets, name: str) -> bool:
    """Whether a site's name is meant: a text is a regular expression for all of it, a tuple holds ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == suffix or name.endswith("." + suffix) for suffix in targets)


@dataclass(frozen=True)
class PeftLayout:
    """How PEFT spells a method on disk: its type, our tensor -> its suffix, our field -> its key (and pattern key)."""

    type: str
    tensors: Mapping[str, str]
    """Name in the delta's state dict -> what follows `base_model.model.<site>.` in PEFT's file."""
    fields: Mapping[str, str] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    """Our field -> PEFT's key for a mapping from patterns to values of that field."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Keys that have this value wherever PEFT means what we mean; PEFT's adapters with another value are refused."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """PEFT's value of a key that a config leaves out, where it is not the default of our field or the constant."""
    harmless: tuple[str, ...] = ()
    """Keys of PEFT that do not change what an adapter computes."""
    embedding: Mapping[str, str] = field(default_factory=dict)
    """The same as `tensors` for a delta on an embedding, where PEFT has other names there."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Name in the shared module's state dict -> what follows `base_model.` in PEFT's file."""
    facts: Callable[[Site, Any], Mapping[str, Any]] | None = None
    """Keys that PEFT wants and that follow from (the first site, config)."""
    translate: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None
    """PEFT's whole config -> our fields that no single key says, for what `fields` cannot express."""
    read: Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Tensor]] | None = None
    """PEFT's (config, tensors by key) -> the tensors under keys of this layout, where files come in several forms."""
    why_not: Callable[[Any], str] | None = None
    """Our config -> why PEFT has no word for it, or an empty text."""
    why_not_at: Callable[[Site], str] | None = None
    """A site -> why PEFT computes something else there, or an empty text."""


def peft_needs_a_dot(field: str, key: str) -> Callable[[DeltaConfig], str]:
    """The `why_not` of a method whose patterns for `field` PEFT reads from `key`, but only for names behind a dot: it
    would never find a layer that a pattern names in full, as our files do."""

    def why_not(config: DeltaConfig) -> str:
        where = [pattern for pattern, fields in config.patterns.items() if field in fields]
        return f"PEFT would not find the {len(where)} sites of its {key}" if where else ""

    return why_not


class Delta(nn.Module):
    """A trained change at one site. Constructed as `Method(site, config)`; its parameters start as the paper says."""

    family: ClassVar[str]
    """addition, specification or reparameterisation"""
    paper: ClassVar[str]
    formula: ClassVar[str]
    """The number of trainable parameters at a site: an expression over the config's fields and the site's sizes."""
    shared_formula: ClassVar[str] = "0"
    """The same for what the sites share, over the config's fields, `shapes` (the distinct (d_in, d_out) of them) and
    `sizes`, what the shared module says of itself."""
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    """The kinds of site where the equation has a meaning."""
    peft: ClassVar[PeftLayout | None] = None
    wants_y: ClassVar[bool] = True
    """False where the method ignores y, so that the base product is not computed for nothing."""
    not_mergeable: ClassVar[str] = ""
    """Why no change of weights is equal to it; needed of every delta that is no WeightDelta."""
    starts_away: ClassVar[str] = ""
    """Why the fresh delta is not the identity, for the few methods whose paper wants that."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Statistics that `start` reads from `site.statistics`: gradient, second_moment."""
    callbacks: ClassVar[tuple[str, ...]] = ()
    """Callbacks of which it needs one to be what its paper describes. A recipe without any gets the first."""
    learning_rate: ClassVar[float] = 5e-4
    """The default, as found by benchmarks/methods (docs/methods.md)."""
    scale: float = 1.0
    """The factor in front of B A, for the inits."""
    offset_A: Tensor | None
    offset_B: Tensor | None

    def __init__(self, site: Site, config: DeltaConfig) -> None:
        super().__init__()
        self.site = site
        self.config = config
        # Where an init splits W, the delta acts on W - offset_B offset_A; see docs/decisions/003. Set by the plumbing.
        self.register_buffer("offset_A", None)
        self.register_buffer("offset_B", None)

    def start(self) -> None:
        """Starting values that are dear to compute (an SVD of W); not called when the tensors come from a file."""

    def penalty(self) -> Tensor | None:
        """What the paper adds to the loss for this site, in nats a token, or None."""
        return None

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """The layer's output y' with this delta on: x [.. d_in], y = base(x) [.. d_out]."""
        raise NotImplementedError


class WeightDelta(Delta):
    """A delta that is a change of weights, and so can be merged."""

    wants_y = False

    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """THE EQUATION: (W [d_out, d_in], b [d_out] or None) -> (W', b'). Pure: the arguments are not changed."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return base.apply(x, *self.effective(base.weight, base.bias))


class AroundDelta(WeightDelta):
    """A change of weights that stands around one product with the base: y' = output(base(input(x))).

    Where the tokens of a pass have different deltas, the base multiplies what goes into it for all of them at once, so
    that W is read once. `effective` stays the equation; the contract compares.
    """

    def input(self, x: Tensor) -> Tensor | None:
        """What the base multiplies for x [.. d_in]: [.. d_in], or [.. k, d_in] for k products a token; None where it
        is better to build W' for so many tokens."""
        return x

    def inside(self) -> tuple[Tensor, Tensor] | None:
        """(A [r, d_in], B [d_out, r]) where `output` acts on z = base(x) + B A x. `input` is x then."""
        return None

    def output(self, z: Tensor, x: Tensor, base: Base) -> Tensor:
        """y' [.. d_out] from z [.. d_out] or [.. k, d_out], what the base made of `input(x)`."""
        return z

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        inner, factors = self.input(x), self.inside()
        if inner is None:
            return super().forward(x, y, base)
        z = base(inner.to(x.dtype)) if factors is None else base.low_rank(x, *factors)
        return self.output(z, x, base)


class AdditiveDelta(WeightDelta):
    """W' = W + dW."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(A [r, d_in], B [d_out, r]) with dW = B A exactly and every scale folded in, or None where there are none.

        The face that pays: the fused training step, serving many adapters at once and the export to plain LoRA are
        written once against it.
        """
        return None

    def matrix(self) -> Tensor:
        """dW [d_out, d_in]."""
        factors = self.factors()
        if factors is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither factors() nor matrix()")
        A, B = factors
        return B @ A

    def increment(self, x: Tensor, base: Base) -> Tensor:
        """dy = x dW^T: x [.. d_in] -> [.. d_out]. Must equal base.apply(x, matrix(), None)."""
        factors = self.factors()
        if factors is None:
            return base.apply(x, self.matrix(), None)
        A, B = factors
        return base.take(x, A) @ B.T

    @final
    def effective(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.matrix(), b

    def forward(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return base(x) + self.increment(x, base)


class InputDelta(Delta):
    """A delta on what the model attends to (prompt, prefix): attached to the model, not to a layer.

    Where positions, packs, masks and caches come in is the plumbing's (`graftlm/model/hosts.py`).
    """

    kinds = ("model",)
    not_mergeable = "it adds positions to attend to, and no weight of the base does"

    def prompt(self) -> Tensor | None:
        """Embeddings [p, d_model] that stand before every sequence."""
        return None

    def prefix(self) -> Tensor | None:
        """Keys and values [layers, 2, key/value heads, p, size of a head] that every token attends to."""
        return None
