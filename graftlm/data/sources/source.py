"""Where rows come from (the sections of a recipe on data), and what a row is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, field_validator

from graftlm.config.schema import Count, Flag, PositiveCount, PositiveRate, Share, Weight, config
from graftlm.config.template_variables import check_variables
from graftlm.data.chat.turn_order import TurnOrder
from graftlm.data.sources.fields import Unread
from graftlm.data.sources.formats import Message
from graftlm.data.sources.prompt_templates import PromptTemplate


@config
class SourceConfig:
    """Rows: where they are, and how to read them. A wrong value raises a ValueError."""

    path: str
    """A .jsonl, .json, .csv, .tsv, .parquet or .arrow file, .jsonl.gz and so on; a pattern (`data/*.jsonl`) or a folder
    of such files; `hub:org/name[@subset][:split]`; `builtin:docstrings`, `builtin:tasks` or `builtin:tasks/NAME`; or
    what another trainer describes: `dataset_info.json:NAME` (LLaMA-Factory) or a .yaml file with `datasets:`
    (Axolotl)."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt-completion",
        "prompt",
        "text",
        "preference",
        "feedback",
        "ranked",
        "natural-instructions",
        "inputs-targets",
    ] = "auto"
    templates: tuple[PromptTemplate, ...] = ()
    """Ways of asking, for rows of any fields; each row is put into one of those whose fields it has, drawn by what
    stands in the row and `train.seed`. Every epoch asks in another way, until each of them has come."""
    weight: PositiveRate = 1.0
    """Among several sources: how much its share of an epoch is multiplied by."""
    cap: PositiveCount | None = None
    """Use no more rows than this, drawn from `train.seed`."""


LENGTH, SELECTED = "length", "selected"


@config
class OrderConfig:
    by: str
    """What rows are sorted by: `length` (in tokens), `selected` (the scores of the last of `select`), or else a field
    of the rows that holds a number."""
    highest_first: Flag = False
    """Begin with the highest in place of the lowest."""
    parts: PositiveCount | None = None
    """Cut the order into so many parts of one size and shuffle the rows of each, anew in every epoch. Without it the
    order is exact, and only rows that are alike are shuffled."""

    @property
    def field(self) -> str | None:
        """The field of the rows that must hold a number."""
        return None if self.by in (LENGTH, SELECTED) else self.by


@config
class DataConfig:
    """What is trained on, how it is split and rendered, and which tokens count. A wrong value raises a ValueError."""

    train: str | SourceConfig | tuple[str | SourceConfig, ...]
    """A source, or a list: each has a share of an epoch in proportion to weight * rows^(1/mix_temperature)."""
    mix_temperature: Annotated[float, Strict(), Field(ge=1)] = 1.0
    """1 is every row once (where weights are 1), 2 the square root of the rows, a large number all sources alike."""
    order: OrderConfig | None = None
    """A curriculum: every epoch runs from rows with a low score to those with a high one. Without it each epoch is
    shuffled."""
    desirable_share: Annotated[float, Strict(), Field(gt=0, lt=1)] | None = None
    """Among rows with feedback, the share that is liked: the epoch stays as long as it is, each row of a kind comes
    equally often, and rows that come once more are drawn from `train.seed`."""
    held_out: Count | Share | str | SourceConfig = 0
    """Rows (100), a share (0.05), or a source of its own; rows with the same group never end up on both sides."""
    inner_rows: str | SourceConfig | None = None
    """Rows of the inner validation split, a source of its own, for callbacks that learn from one (`bilora`, `alora` and
    others). Without it, the split is a share of the training rows, on which no step trains then."""
    strict: Flag = False
    """Stop at rows that cannot be used, instead of leaving them out and reporting them."""
    template_variables: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, by name: `enable_thinking: false`, `reasoning_effort: low`, `date_string: 1 May
    2026`. They become part of the template that the adapter keeps, so whoever asks it has them too. A row may set its
    own, in a field of the same name."""
    turn_order: TurnOrder = "refuse"
    """What becomes of two questions or two answers in a row, an answer to nothing, a late system message, and a system
    message that the chat template has no place for: `merge` joins them with their neighbors, `drop` leaves them out."""
    mask: Literal["response", "last-turn", "instruction", "no-boilerplate", "everything"] = "response"
    prompt_weight: Weight = 0.0
    """The weight, from 0 to 1, of tokens that the mask leaves out."""
    max_tokens: PositiveCount = 1024
    over_length: Literal["drop", "truncate", "error"] = "drop"
    pack: Flag = True
    """Lay rows end to end with attention kept apart; false runs one row at a time, for models that cannot be packed."""

    @field_validator("train")
    @classmethod
    def _at_least_one(cls, train: Any) -> Any:
        if train == ():
            raise ValueError("an empty list of sources: name one at least")
        return train

    @field_validator("template_variables")
    @classmethod
    def _names(cls, variables: dict[str, Any]) -> dict[str, Any]:
        check_variables(variables)
        return variables

    def sources(self) -> list[SourceConfig]:
        """What is trained on, one or several."""
        listed = self.train if isinstance(self.train, tuple) else (self.train,)
        return [SourceConfig(path=source) if isinstance(source, str) else source for source in listed]


@dataclass(frozen=True)
class Row:
    """A conversation, where it stands, and the group that decides on which side of a split it falls."""

    messages: list[Message]
    where: str
    group: str
    tools: tuple[dict[str, Any], ...] = ()
    """What an assistant could call: functions with a JSON schema, as OpenAI has them."""
    rejected: tuple[list[Message], ...] = ()
    """Whole conversations that were liked less than `messages`, the best of them first; a pair has one."""
    desirable: bool | None = None
    """Feedback without a pair: whether the answer was liked. None where the row does not say."""
    score: float | None = None
    """What `data.order` sorts by: a number that stands in the row, or that a selector gave it."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template that the row sets (`enable_thinking`)."""
    unread: Unread = field(default=(), compare=False)
    """Keys of the row and of its messages that no reader has used, each as often as it occurs."""
    template: int | None = field(default=None, compare=False)
    """The number, from 0, of the entry of `templates` that asks this row."""
