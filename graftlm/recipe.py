"""The recipe: everything that a run is, in one tree. YAML and `graftlm.train(Recipe(...))` are the same thing."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Field, ValidationInfo, field_validator, model_validator

from graftlm.callbacks import COMPLETES, POLICIES
from graftlm.config.aliases import OTHER_NAMES
from graftlm.config.schema import Count, Flag, PositiveCount, config
from graftlm.config.source import read
from graftlm.data.sources.source import DataConfig
from graftlm.deltas import METHODS
from graftlm.deltas.base import DeltaConfig
from graftlm.deltas.lora import LoraConfig
from graftlm.errors import nearest
from graftlm.losses import LOSSES, LossConfig
from graftlm.losses.distillation import DistillationConfig
from graftlm.losses.supervised import SupervisedConfig
from graftlm.model.hub.load import BaseConfig
from graftlm.model.layers.attach import needed_statistics
from graftlm.plugins import load_plugins, refuse_broken
from graftlm.rl.config import OnlineConfig
from graftlm.selection import SELECTORS
from graftlm.selection.base import SelectorConfig
from graftlm.training.callback import PolicyConfig
from graftlm.training.loop import TrainConfig
from graftlm.training.regularizers import REGULARISERS, RegulariserConfig, tie

load_plugins()  # what they add to the tables is in the unions

if TYPE_CHECKING:
    AnyDelta = DeltaConfig
    AnyLoss = LossConfig
    AnyPolicy = PolicyConfig
    AnyRegulariser = RegulariserConfig
    AnySelector = SelectorConfig
else:  # whichever configs are in the tables, told apart by their `method`, or `by`
    _SELECTORS = tuple(selector.config for selector in SELECTORS.values())
    AnySelector = Annotated[Union[_SELECTORS], Field(discriminator="by")]  # noqa: UP007
    _POLICIES = tuple(row.config for row in POLICIES.values())
    AnyPolicy = Annotated[Union[_POLICIES], Field(discriminator="name")] if len(_POLICIES) > 1 else _POLICIES[0]  # noqa: UP007
    _REGULARISERS = tuple(schema for schema, _ in REGULARISERS.values())
    AnyRegulariser = Annotated[Union[_REGULARISERS], Field(discriminator="name")]  # noqa: UP007
    _LOSSES = tuple(loss.config for loss in LOSSES.values())
    AnyLoss = Annotated[Union[_LOSSES], Field(discriminator="name")]  # noqa: UP007
    _CONFIGS = tuple(method.config for method in METHODS.values())
    AnyDelta = Annotated[Union[_CONFIGS], Field(discriminator="method")] if len(_CONFIGS) > 1 else _CONFIGS[0]  # noqa: UP007


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


def _or_a_name(schema: dict[str, Any]) -> None:
    """Lets editors complete `loss: NAME` too."""
    schema["oneOf"].insert(0, {"enum": list(LOSSES), "type": "string"})


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
    loss: AnyLoss = Field(default_factory=SupervisedConfig, json_schema_extra=_or_a_name)
    """The objective: a name, or `{name: NAME, ...}` with options."""
    regularisers: tuple[AnyRegulariser, ...] = ()
    """What is added to the objective: `{name: NAME, weight: WEIGHT, ...}` each, or one."""
    online: OnlineConfig | None = None
    """Let the model answer the rows' questions by itself while it is trained, and train on these answers by what a
    scorer says of them."""
    policies: tuple[AnyPolicy, ...] = ()
    """What acts between steps: names, or `{name: NAME, ...}` with options."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    OTHER_NAMES: ClassVar[Mapping[str, str]] = OTHER_NAMES
    """What other trainers call these keys."""
    network: Flag = False
    """Allow a base or a data set to be fetched from the hub, and trackers to send data to other machines."""

    @field_validator("regularisers", mode="before")
    @classmethod
    def _one_regulariser(cls, given: object) -> object:
        given = [given] if isinstance(given, Mapping) else given
        for each in given if isinstance(given, list | tuple) else ():
            if isinstance(each, Mapping) and (name := str(each.get("name"))) not in REGULARISERS:
                raise ValueError(f"{name!r} is no regulariser. {nearest(name, REGULARISERS)}")
        return given

    @field_validator("select", mode="before")
    @classmethod
    def _one_selector(cls, given: object) -> object:
        return [given] if isinstance(given, Mapping) else given

    @field_validator("loss", mode="before")
    @classmethod
    def _loss_by_name(cls, given: object) -> object:
        named = {"name": given} if isinstance(given, str) else given
        if not isinstance(named, Mapping):
            return named
        if "name" not in named:
            raise ValueError("give its name too: {name: NAME, ...}")
        if (name := str(named["name"])) not in LOSSES:
            raise ValueError(f"{name!r} is no loss. {nearest(name, LOSSES)}")
        return named

    @field_validator("policies", mode="before")
    @classmethod
    def _by_name(cls, given: object) -> object:
        given = [given] if isinstance(given, str | Mapping) else given
        if not isinstance(given, list | tuple):
            return given
        named = [{"name": each} if isinstance(each, str) else each for each in given]
        for each in named:
            if isinstance(each, Mapping) and (name := str(each.get("name"))) not in POLICIES:
                raise ValueError(f"{name!r} is no policy. {nearest(name, POLICIES)}")
        return named

    @field_validator("policies", "regularisers")
    @classmethod
    def _each_once(cls, given: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [each.name for each in given]
        if len(names) > len(set(names)):
            raise ValueError(f"{max(names, key=names.count)!r} stands here twice")
        return given

    @field_validator("*", mode="before")
    @classmethod
    def _no_broken_plugin(cls, given: object, info: ValidationInfo) -> object:
        refuse_broken(info.field_name or "", given)
        return given

    @model_validator(mode="after")
    def _one_or_several(self) -> "Recipe":
        if self.delta is not None and self.deltas:
            raise ValueError("give delta, or several by name in deltas, not both")
        if self.delta is None and not self.deltas:
            object.__setattr__(self, "delta", LoraConfig())  # frozen for everybody else
        return self

    @model_validator(mode="after")
    def _complete(self) -> "Recipe":
        names = {policy.name for policy in self.policies}
        for method in dict.fromkeys(delta.method for delta in self.all_deltas().values()):
            if (needs := COMPLETES.get(method)) and not names.intersection(needs):
                own: Any = POLICIES[needs[0]].config(name=needs[0])
                object.__setattr__(self, "policies", (*self.policies, own))
        return self

    @model_validator(mode="after")
    def _comparable(self) -> "Recipe":
        needs, name = LOSSES[self.loss.name].rows, self.loss.name
        if needs in ("pairs", "feedback"):
            if self.data.mask not in ("response", "last-turn") or self.data.prompt_weight:
                raise ValueError(
                    f"loss {name} compares answers and nothing else: use data.mask response and no data.prompt_weight"
                )
            if self.select:
                raise ValueError(f"select chooses rows for loss supervised; loss {name} takes them as they are")
        if tie(self.regularisers) and "neftune" in [policy.name for policy in self.policies]:
            raise ValueError("policy neftune would disturb the policy and not the base that regulariser kl ties it to")
        if self.loss.needs_reference and "neftune" in [policy.name for policy in self.policies]:
            raise ValueError(
                f"policy neftune would disturb the reference of loss {name} as it does the policy: drop one"
            )
        if isinstance(self.loss, DistillationConfig):
            if self.loss.teacher is None and not self.loss.supervised_weight:
                raise ValueError(
                    "loss distillation needs a teacher: another base, or the folder of an adapter for it. Without "
                    "one the policy is held to its own base, which means something beside a supervised_weight only"
                )
            if "neftune" in [policy.name for policy in self.policies]:
                raise ValueError("policy neftune would disturb the policy and not its teacher: drop one")
        passes = self.loss.needs_reference or isinstance(self.loss, DistillationConfig) or tie(self.regularisers)
        if passes and "i-lora" in [policy.name for policy in self.policies]:
            raise ValueError(
                "policy i-lora ties the hidden states of the pass that learns: drop it, or what makes passes of its "
                f"own ({'regulariser kl' if tie(self.regularisers) else f'loss {name}'})"
            )
        if needs == "pairs" and not self.data.pack:
            raise ValueError(f"loss {name} sees two answers in one pass: set `data: {{pack: true}}`")
        if LOSSES[name].statistic is not None and self.train.batch_rows < 2:
            raise ValueError(f"loss {name} needs answers to other prompts of a step: set train.batch_rows to 2 or more")
        return self

    @model_validator(mode="after")
    def _online(self) -> "Recipe":
        online, data, train, name = self.online, self.data, self.train, self.loss.name
        needs = LOSSES[name].rows
        if online is None:
            return self
        if needs == "text":
            raise ValueError(f"loss {name} trains raw text, and online gives answers: use supervised, or another loss")
        if needs == "rewards" and (online.temperature, online.top_p) != (1.0, 1.0):
            raise ValueError(
                f"loss {name} needs online.temperature and top_p at 1: its gradient is that of answers which the "
                "policy itself gives, and these would be drawn from another distribution"
            )
        if needs != "answers" and not data.pack:
            raise ValueError(f"loss {name} sees several answers in one pass: set `data: {{pack: true}}`")
        if data.mask != "response" or data.prompt_weight:
            raise ValueError("online trains what the model answered: use data.mask response and no data.prompt_weight")
        if data.over_length == "truncate":
            raise ValueError("a question that was cut asks something else: online takes data.over_length drop or error")
        if data.max_tokens <= online.max_new_tokens:
            raise ValueError(
                f"data.max_tokens {data.max_tokens} must hold a prompt and online.max_new_tokens "
                f"{online.max_new_tokens}: raise the one or lower the other"
            )
        if self.select or data.desirable_share is not None:
            key = "select" if self.select else "data.desirable_share"
            raise ValueError(f"{key} chooses rows by their answers, and online takes questions only: leave one out")
        if train.early_stopping or train.on_spike == "return":
            key = "early_stopping" if train.early_stopping else "on_spike: return"
            raise ValueError(f"train.{key} looks at the loss, which says nothing where answers change with the model")
        if aside := [p.name for p in self.policies if POLICIES[p.name].policy.wants_aside]:
            raise ValueError(f"policy {aside[0]} learns from rows that are put aside, and online makes its rows itself")
        if starts := [c.method for c in self.all_deltas().values() if needed_statistics(c)]:
            raise ValueError(
                f"delta {starts[0]} starts from what it sees of training rows, and online makes them later: choose "
                "another init or method"
            )
        return self

    def all_deltas(self) -> dict[str, DeltaConfig]:
        """Every delta by its name, in the order in which they act; a single one is called `default`."""
        return {"default": self.delta} if self.delta is not None else dict(self.deltas)

    def passes(self) -> dict[str, Any]:
        """How packs go through the model, as `loop.training_pass` takes it."""
        train = self.train
        return {"packed": self.data.pack, "checkpointing": train.checkpointing, "offload": train.offload}

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "Recipe":
        if self.train.steps is not None and self.train.epochs is not None:
            raise ValueError("train: give steps or epochs, not both")
        return self

    @model_validator(mode="after")
    def _stops_on_something(self) -> "Recipe":
        if self.train.early_stopping and not self.data.held_out:
            raise ValueError("train.early_stopping looks at held-out rows: set data.held_out")
        if self.train.early_stopping and self.train.in_turn:
            raise ValueError("train.early_stopping knows one end, and train.in_turn has several: leave one out")
        return self

    @model_validator(mode="after")
    def _kernels_in_packs(self) -> "Recipe":
        if self.train.kernels in ("ours", "compiled") and not self.data.pack:
            raise ValueError(
                f"train.kernels: {self.train.kernels} computes packs only: set `data: {{pack: true}}` or "
                "train.kernels: auto"
            )
        return self


def read_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe from a YAML file and lay `key=value` strings over it (`train.steps=100`).

    Returns the Recipe. Raises RecipeError with file, line and key.
    """
    return read(Recipe, Path(path), overrides)
