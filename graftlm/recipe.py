"""The recipe: everything that a run is, in one tree. YAML and `graftlm.train(Recipe(...))` are the same thing.

A recipe knows the tables of its parts and no part by its name. What a part needs of the others is written in the part,
as `conflict_in(recipe)`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Field, ValidationInfo, field_validator, model_validator

from graftlm.adapters.adapter import Adapter
from graftlm.callbacks import CALLBACKS
from graftlm.config.aliases import OTHER_NAMES
from graftlm.config.schema import Count, Flag, PositiveCount, config
from graftlm.config.source import read
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.source import DataConfig
from graftlm.deltas import METHODS
from graftlm.deltas.base import DeltaConfig
from graftlm.deltas.lora import LoraConfig
from graftlm.errors import nearest
from graftlm.hub.config import BaseConfig
from graftlm.losses import LOSSES, LossConfig
from graftlm.losses.supervised import SupervisedConfig
from graftlm.optim import OPTIMIZERS
from graftlm.optim.adamw import AdamWConfig
from graftlm.plugins import load_plugins, refuse_broken
from graftlm.rl.config import RLConfig
from graftlm.rl.rewards import Scorer, make_scorer
from graftlm.rl.rollouts import Sampler
from graftlm.selection import SELECTORS
from graftlm.selection.base import SelectorConfig
from graftlm.training.callback import Callback, CallbackConfig, OptimizerConfig
from graftlm.training.config import StatisticsConfig, TrainConfig
from graftlm.training.regularizers import REGULARIZERS, RegularizerConfig
from graftlm.training.setup import Answers, Setup
from graftlm.training.start_from import check_delta, read_start
from graftlm.training.tokenizer import run_tokenizer

load_plugins()  # what they add to the tables is in the unions

if TYPE_CHECKING:
    AnyCallback = CallbackConfig
    AnyDelta = DeltaConfig
    AnyLoss = LossConfig
    AnyOptimizer = OptimizerConfig
    AnyRegularizer = RegularizerConfig
    AnySelector = SelectorConfig
else:  # a union of the configs in a table, of which one key names the member

    def _union(configs: Sequence[type], key: str) -> Any:
        return Annotated[Union[tuple(configs)], Field(discriminator=key)]  # noqa: UP007 (made at run time)

    AnyCallback = _union([row.config for row in CALLBACKS.values()], "name")
    AnyDelta = _union([method.config for method in METHODS.values()], "method")
    AnyLoss = _union([loss.config for loss in LOSSES.values()], "name")
    AnyOptimizer = _union([row.config for row in OPTIMIZERS.values()], "name")
    AnyRegularizer = _union([schema for schema, _ in REGULARIZERS.values()], "name")
    AnySelector = _union([selector.config for selector in SELECTORS.values()], "by")


@config
class ReportConfig:
    """What is measured on held-out rows, and where a run is watched. A wrong value raises a ValueError."""

    samples: Count = 8
    """Held-out answers shown side by side."""
    answers: Count = 100
    """Held-out rows that are answered, before and after, and scored by ROUGE-L; the loss is over all held-out rows."""
    max_new_tokens: PositiveCount = 96
    """The longest of those answers, in tokens; one that does not end by then is cut."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where to watch the run beside metrics.jsonl: each receives the lines of that file. Their libraries must be
    installed; nothing leaves this machine without `network`."""


def _or_a_name(table: Mapping[str, Any]) -> Any:
    """Lets editors complete `loss: NAME` and `optimizer: NAME` too."""

    def extend(schema: dict[str, Any]) -> None:
        schema["oneOf"].insert(0, {"enum": list(table), "type": "string"})

    return extend


def _name(value: object) -> str:
    """The name in `NAME` or {name: NAME, ...}; an empty text where there is none."""
    name = value.get("name") if isinstance(value, Mapping) else value
    return name if isinstance(name, str) else ""


def _with_known_name(value: object, table: Mapping[str, Any], kind: str) -> object:
    """`NAME` as {name: NAME}. ValueError for a name that is not in the table."""
    tree = {"name": value} if isinstance(value, str) else value
    if not isinstance(tree, Mapping):
        return tree
    if "name" not in tree:
        raise ValueError("give its name too: {name: NAME, ...}")
    if (name := str(tree["name"])) not in table:
        raise ValueError(f"unknown {kind} {name!r}. {nearest(name, table)}")
    return tree


def _list(value: object) -> object:
    """One entry as a list of one."""
    return [value] if isinstance(value, str | Mapping) else value


@config
class Recipe:
    """Everything that a run is: `train` takes it, and YAML has the same keys. A wrong value raises a ValueError."""

    base: str | BaseConfig = "smollm2"
    data: DataConfig
    select: tuple[AnySelector, ...] = ()
    """Choose among the training rows before anything else: one selector, or several in turn."""
    delta: AnyDelta | None = None
    """The delta to train; LoRA with its defaults where neither this nor `deltas` is given."""
    deltas: Mapping[str, AnyDelta] = Field(default_factory=dict)
    """Several by name, all on one model: each acts on what those before it left, each is an adapter of its own."""
    start_from: str | None = None
    """The folder of an adapter to continue: its tensors are the start, and `delta` is its config if it is not given."""
    loss: AnyLoss = Field(default_factory=SupervisedConfig, json_schema_extra=_or_a_name(LOSSES))
    """The objective: a name, or `{name: NAME, ...}` with options."""
    regularisers: tuple[AnyRegularizer, ...] = ()
    """What is added to the objective: `{name: NAME, weight: WEIGHT, ...}` each, or one."""
    rl: RLConfig | None = None
    """Online RL: the model answers the rows' questions while it is trained, and learns from the rewards of these
    answers."""
    optimizer: AnyOptimizer = Field(default_factory=AdamWConfig, json_schema_extra=_or_a_name(OPTIMIZERS))
    """What updates parameters: a name, or `{name: NAME, ...}` with options."""
    callbacks: tuple[AnyCallback, ...] = ()
    """What else acts between steps, in this order: names, or `{name: NAME, ...}` with options."""
    statistics: StatisticsConfig | None = None
    """`{rows: SOURCE}`: what inits and methods that start from the data look at, in place of the first training
    rows."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    network: Flag = False
    """Allow a base or a data set to be fetched from the hub, and trackers to send data to other machines."""

    OTHER_NAMES: ClassVar[Mapping[str, str]] = OTHER_NAMES
    """What other trainers call these keys."""
    REPLACED: ClassVar[Mapping[str, str]] = {
        "policies": "optimizer, for what updates parameters (adamw if not given), and callbacks, for all others",
        "online": "rl",
    }
    """Keys of earlier versions, and what took their place."""

    @field_validator("select", mode="before")
    @classmethod
    def _selectors(cls, value: object) -> object:
        return _list(value)

    @field_validator("loss", mode="before")
    @classmethod
    def _loss(cls, value: object) -> object:
        return _with_known_name(value, LOSSES, "loss")

    @field_validator("optimizer", mode="before")
    @classmethod
    def _optimizer(cls, value: object) -> object:
        if (name := _name(value)) in CALLBACKS:
            raise ValueError(f"{name} is a callback: write `callbacks: [{name}]`")
        return _with_known_name(value, OPTIMIZERS, "optimizer")

    @field_validator("regularisers", mode="before")
    @classmethod
    def _regularizers(cls, value: object) -> object:
        value = _list(value)
        return (
            [_with_known_name(each, REGULARIZERS, "regulariser") for each in value]
            if isinstance(value, list | tuple)
            else value
        )

    @field_validator("callbacks", mode="before")
    @classmethod
    def _callbacks(cls, value: object) -> object:
        value = _list(value)
        if not isinstance(value, list | tuple):
            return value
        for each in value:
            if (name := _name(each)) in OPTIMIZERS:
                raise ValueError(f"{name} is an optimizer, and a run has one: write `optimizer: {name}`")
        return [_with_known_name(each, CALLBACKS, "callback") for each in value]

    @field_validator("callbacks", "regularisers")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [each.name for each in value]
        if len(names) > len(set(names)):
            raise ValueError(f"{max(names, key=names.count)!r} is listed twice")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_broken_plugin(cls, value: object, info: ValidationInfo) -> object:
        refuse_broken(info.field_name or "", value)
        return value

    @model_validator(mode="after")
    def _one_or_several(self) -> "Recipe":
        if self.delta is not None and self.deltas:
            raise ValueError("give delta, or several by name in deltas, not both")
        if self.start_from is not None and self.deltas:
            raise ValueError("start_from continues one adapter, and deltas are several: leave deltas out")
        if self.start_from is not None and self.delta is None:
            object.__setattr__(self, "delta", read_start(self.start_from).config)
        if self.delta is None and not self.deltas:
            object.__setattr__(self, "delta", LoraConfig())  # frozen for everybody else
        return self

    @model_validator(mode="after")
    def _complete(self) -> "Recipe":
        """Add the callbacks that methods need to be what their papers describe (`Delta.callbacks`)."""
        names = {callback.name for callback in self.callbacks}
        for method in dict.fromkeys(delta.method for delta in self.all_deltas().values()):
            needs = METHODS[method].delta.callbacks
            if needs and not names.intersection(needs):
                own: Any = CALLBACKS[needs[0]].config(name=needs[0])
                object.__setattr__(self, "callbacks", (*self.callbacks, own))
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> "Recipe":
        for conflict in self._conflicts():
            if conflict:
                raise ValueError(conflict)
        return self

    def _conflicts(self) -> Iterator[str]:
        yield LOSSES[self.loss.name].conflict_in(self)
        yield self.train.conflict_in(self)
        if self.statistics is not None:
            yield self.statistics.conflict_in(self)
        if self.rl is not None:
            yield self.rl.conflict_in(self)
        if self.data.inner_rows is not None and not self._callbacks_with_inner_rows():
            names = ", ".join(name for name, row in CALLBACKS.items() if row.callback.inner_share)
            yield f"data.inner_rows: no callback of the recipe learns from them. These do: {names}"
        for each in self.all_callbacks():
            if reason := _callback_class(each).conflict_in(self):
                yield f"{'optimizer' if each is self.optimizer else 'callback'} {each.name}: {reason}"

    def all_deltas(self) -> dict[str, DeltaConfig]:
        """Every delta by its name, in the order in which they act; a single one is called `default`."""
        return {"default": self.delta} if self.delta is not None else dict(self.deltas)

    def all_callbacks(self) -> list[CallbackConfig]:
        """The optimizer, then the callbacks."""
        return [self.optimizer, *self.callbacks]

    def inner_share(self) -> float:
        """The share of the training rows that becomes the inner validation split."""
        if self.data.inner_rows is not None:
            return 0.0
        return max((each.inner_share for each in self._callbacks_with_inner_rows()), default=0.0)

    def _callbacks_with_inner_rows(self) -> list[type[Callback]]:
        classes = [_callback_class(each) for each in self.all_callbacks()]
        return [each for each in classes if each.inner_share]

    def tokenizer(self) -> Any:
        """The tokenizer of the run; see `run_tokenizer` for what it raises."""
        return run_tokenizer(self.base, self.data.template_variables, network=self.network)

    def start_adapter(self) -> Adapter | None:
        """The adapter in `start_from`; RecipeError where `delta` is not its config. None where there is none."""
        if self.start_from is None:
            return None
        adapter = read_start(self.start_from)
        assert self.delta is not None, "it is the adapter's where it was not given"
        check_delta(adapter, self.delta)
        return adapter

    def setup(self, scorer: Scorer | None = None, renderer: Renderer | None = None) -> Setup:
        """What training takes of the recipe. With `rl`, the scorer and the renderer of the run may be given."""
        rl, sampler = self.rl, dict[str, Any]()
        if rl is not None:
            sampler["scorer"] = scorer or make_scorer(rl.scorer, network=self.network)
            sampler["renderer"] = renderer or Renderer(self.tokenizer(), turn_order=self.data.turn_order)
            sampler |= {"packed": self.data.pack, "sharing": self.train.prefix_sharing}

        def make_callbacks() -> list[Callback]:
            callbacks = [_callback_class(each)(each) for each in self.all_callbacks()]
            return callbacks if rl is None else [*callbacks, Sampler(rl, self.loss, **sampler)]

        return Setup(
            base=self.base,
            deltas=self.all_deltas(),
            loss=self.loss,
            regularizers=self.regularisers,
            train=self.train,
            make_callbacks=make_callbacks,
            packed=self.data.pack,
            network=self.network,
            start_from=self.start_adapter(),
            answers=None if rl is None else Answers(rl.samples, rl.max_new_tokens),
        )


def _callback_class(each: CallbackConfig) -> type[Callback]:
    return (OPTIMIZERS if isinstance(each, OptimizerConfig) else CALLBACKS)[each.name].callback


def read_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe from a YAML file and lay `key=value` strings over it (`train.steps=100`).

    Returns the Recipe. Raises RecipeError with file, line and key.
    """
    return read(Recipe, Path(path), overrides)
