"""The recipe of a composition: what `graft compose` takes, as options or as a YAML file with the same keys."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, NamedTuple, Union

from pydantic import Field, field_validator

from graftlm.adapters.adapter import NO_CHAT, Adapter
from graftlm.adapters.load import load_named_base
from graftlm.combine.compose import Composition, check_one_base, common_chat, compose, config_named
from graftlm.combine.few_shot import SumSpace, few_shot_loss
from graftlm.combine.layer_weights import LayerWeights, learn_layer_weights
from graftlm.combine.rules import COMPOSERS
from graftlm.combine.rules.base import Convention, RuleConfig
from graftlm.combine.rules.cat import CatConfig
from graftlm.combine.rules.linear import LinearConfig
from graftlm.combine.search import Found, search_weights
from graftlm.combine.spaces import Space
from graftlm.config.schema import Count, Flag, PositiveCount, config
from graftlm.data.batches.pack import lay_out
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.preflight import prepare
from graftlm.data.sources.mixing import read_data
from graftlm.data.sources.source import DataConfig, SourceConfig
from graftlm.errors import RecipeError
from graftlm.hub.load import Loaded, load_base

if TYPE_CHECKING:
    AnyRule = RuleConfig
else:
    AnyRule = Annotated[
        Union[tuple(row.config for row in COMPOSERS.values())],  # noqa: UP007 (made at run time)
        Field(discriminator="name"),
    ]


SEARCHED: dict[str, SumSpace] = {"linear": "product", "lorahub": "factors"}
"""The rules whose weights can be searched -> the space of the sum, for `few_shot_loss`. (`cat` learns its own.)"""


@config
class SearchConfig:
    """Weights that are found from a few examples (`search.py`). A wrong value raises a ValueError."""

    rows: str
    """Rows with answers, as training takes them."""
    examples: PositiveCount = 5
    """So many of the rows are drawn by the seed; all of them where there are no more."""
    evaluations: PositiveCount = 40
    """How often the loss is computed at most; by cat, each but the last with its gradient."""


@config
class ComposeConfig:
    """Adapters of one base, and how they become one. A wrong value raises a ValueError."""

    adapters: tuple[str, ...] = Field(min_length=1)
    """Folders of adapters, graftlm's or PEFT's."""
    by: AnyRule = Field(default_factory=LinearConfig)
    """The rule: a name, or `{name: NAME, ...}` with options."""
    weights: tuple[float, ...] | dict[str, tuple[float, ...]] | None = None
    """One for each adapter; without them, 1 each. Or a mapping from each layer that is changed to one for each."""
    search: SearchConfig | None = None
    """Find the weights, in place of `weights`; for linear, lorahub and, a weight for each layer, cat."""
    space: Space | None = None
    """The space in which the rule acts: by default the first one of the rule, `core` for most."""
    convention: Convention | None = None
    """The source to follow where sources of the rule differ: by default the first, `paper` for all but peft-linear."""
    rank: PositiveCount | None = None
    """The largest rank of the result at a layer; without it, the smallest rank that holds the result exactly."""
    seed: Count = 0
    """For rules that draw, and for the search."""
    base: str | None = None
    """The base of the adapters: by default the one that the first adapter names."""
    network: Flag = False
    """Allow the base to be fetched from the hub."""

    @field_validator("by", mode="before")
    @classmethod
    def _by(cls, value: object) -> object:
        tree = {"name": value} if isinstance(value, str) else value
        name = str(tree.get("name", "")) if isinstance(tree, Mapping) else None
        try:
            if name is not None:
                config_named(name)
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return tree


class Result(NamedTuple):
    """What a recipe made."""

    config: ComposeConfig
    """The recipe; after a search with the weights that it found in place of `search`."""
    composition: Composition
    found: Found | LayerWeights | None = None
    """What the search found."""
    rows: int = 0
    """How many rows the search looked at."""


def run(config: ComposeConfig) -> Result:
    """Read the adapters, load their base, find weights if they are to be found, and compose.

    Raises what `Adapter.read`, `load_base`, `compose` and, for a search, reading and rendering rows raise; RecipeError
    for a search that does not go with other settings, or that finds nothing.
    """
    _check_search(config)
    members = [Adapter.read(folder) for folder in config.adapters]
    check_one_base(members)
    base = _load(config, members[0])
    found, rows = None, 0
    if config.search is not None:
        found, rows = _search(config, config.search, base, members)
        config = replace(config, weights=found.weights, search=None)
    composition = compose(
        base.model,
        members,
        by=config.by,
        weights=config.weights,
        space=config.space,
        convention=config.convention,
        rank=config.rank,
        seed=config.seed,
    )
    return Result(config, composition, found, rows)


def _check_search(config: ComposeConfig) -> None:
    if config.search is None:
        if config.by.name == "cat" and not isinstance(config.weights, dict):
            raise RecipeError(
                "cat learns a weight for each adapter and layer from rows of the task: give these (--search ROWS), or "
                "the weights of each layer in a recipe. One weight for each adapter is --by linear",
                code="missing-option",
            )
        return
    if config.weights is not None:
        raise RecipeError(
            "search finds the weights, and weights gives them: leave out one of the two (--search, --weights)",
            code="conflicting-settings",
        )
    if config.by.name not in (*SEARCHED, "cat"):
        raise RecipeError(
            f"search finds weights of a sum: by {', '.join(SEARCHED)} or cat, not {config.by.name}. Use the "
            f"weights that it finds: --by {config.by.name} --weights ...",
            code="conflicting-settings",
        )


def _search(
    config: ComposeConfig, wanted: SearchConfig, base: Loaded, members: Sequence[Adapter]
) -> tuple[Found | LayerWeights, int]:
    """(what the search found, the number of rows that it looked at)"""
    chat = common_chat(members) or NO_CHAT  # the result is asked in this way
    renderer = Renderer(base.tokenizer, chat.template, today=chat.today, turn_order=chat.turn_order or "refuse")
    data = DataConfig(
        train=SourceConfig(path=wanted.rows, cap=wanted.examples),
        strict=True,
        over_length="error",
        turn_order=renderer.turn_order,
    )
    rows = read_data(data, seed=config.seed, network=config.network).train
    examples, _ = prepare(rows, renderer, data)
    # One row at a time: the same result as in packs, for models that cannot be packed too.
    packs = lay_out(examples, data.max_tokens, packed=False)
    if isinstance(config.by, CatConfig):
        learned = learn_layer_weights(
            base.model,
            members,
            packs,
            evaluations=wanted.evaluations,
            learning_rate=config.by.learning_rate,
            needs_rank=config.rank is None,
        )
        return learned, len(rows)
    space = SEARCHED[config.by.name]
    with few_shot_loss(base.model, members, packs, space=space, needs_rank=config.rank is None) as score:
        found = search_weights(len(members), score, budget=wanted.evaluations, seed=config.seed)
    if not any(found.weights):
        raise RecipeError(
            f"search: no weights in {found.evaluations} evaluations are better than 0 each, which is the base alone "
            f"({found.start:.4g}): these adapters may not help on these rows. Allow more evaluations (--evaluations), "
            "or give other adapters or rows",
            code="nothing-found",
        )
    return found, len(rows)


def _load(config: ComposeConfig, first: Adapter) -> Loaded:
    """The base that the config names, or else the one that the first adapter names."""
    if config.base is not None:
        return load_base(config.base, network=config.network)
    named = (first.base or {}).get("name") or first.peft_config.get("base_model_name_or_path") or "smollm2"
    return load_named_base(str(named), str(first.where), network=config.network)
