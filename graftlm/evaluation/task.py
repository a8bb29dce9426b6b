"""Tasks: what models are asked, and what their answers are measured by.

    tasks:                                      # tasks.yaml
      capitals:
        rows: capitals.jsonl                    # {"country": "France", "capital": ["Paris", "paris"]}
        prompt: ["What is the capital of {country}?", "{country}: its capital?"]
        answer: "{capital}"
        metrics: [exact_match, token_f1]

`{field}` stands for a field of the row, {{ and }} for braces. An `answer` that is one field with a list has several
references. A task without a `prompt` reads its rows as training does (`graftlm/data/sources`): what stands before the
last answer of a conversation is asked, and that answer is the reference.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

from pydantic import field_validator, model_validator

from graftlm.config.schema import Count, Flag, PositiveCount, config
from graftlm.data.batches.prompts import asked_in
from graftlm.data.sources.formats import Message
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.parts import parts_of
from graftlm.data.sources.prompt_templates import FIELD
from graftlm.data.sources.records import Problem, records
from graftlm.data.sources.source import Row
from graftlm.errors import DataError, RecipeError, nearest
from graftlm.evaluation.metrics import METRICS, Answer, Choice, Likelihood, MetricConfig, metric_of, shown_name

Kind = Literal["generate", "choice", "likelihood"]
OUTCOMES: dict[str, type] = {"generate": Answer, "choice": Choice, "likelihood": Likelihood}
DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "generate": ("exact_match",),
    "choice": ("acc", "acc_norm"),
    "likelihood": ("nats_per_token", "bits_per_byte"),
}
BUILTIN = "builtin:tasks"


@config
class ShotsConfig:
    """Examples that stand before each question, the same for all."""

    rows: str
    """Rows of the same fields as the task's: none of these themselves."""
    count: PositiveCount = 3
    seed: Count = 0
    """Draws them."""


@config
class TaskConfig:
    rows: str
    """A source as `data.train` has it: a .jsonl, .json, .csv or .parquet file, a pattern, `builtin:tasks/NAME`."""
    kind: Kind = "generate"
    """`generate`: the model answers. `choice`: it says how likely each of `choices` is. `likelihood`: how likely the
    answer is; without anything before it where `prompt` is empty."""
    prompt: str | tuple[str, ...] | None = None
    """What is asked, with {field} for fields of the row; several ways of asking are measured each by itself."""
    answer: str | None = None
    """What would be right. For `choice`: the number of a choice from 0, its text, or a list of these."""
    choices: str | tuple[str, ...] | None = None
    """Of `choice`: a template for each, or one that is a single {field} with a list."""
    system: str | None = None
    """A system message, where prompts are rendered by the chat template."""
    chat: Flag = True
    """Render by the chat template. false: the prompt is the beginning of a text, which goes on with the answer."""
    separator: str | None = None
    """What stands between prompt and choice or answer. Default: nothing with `chat`, a space without."""
    shots: ShotsConfig | None = None
    metrics: tuple[str | Mapping[str, Any], ...] = ()
    """Names of METRICS, or {name: NAME, option: value}, or {python: FILE.py:NAME}. The first one decides."""
    group: str = "group"
    """The field whose rows belong together: statistics draw groups. Rows without it are a group each."""
    limit: PositiveCount | None = None
    """Measure so many rows, drawn from `seed`; all of them where there are no more."""
    seed: Count = 0
    max_new_tokens: PositiveCount = 128
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends."""

    @field_validator("prompt")
    @classmethod
    def _one_at_least(cls, prompt: Any) -> Any:
        if prompt == ():
            raise ValueError("an empty list of prompts: give one at least")
        return prompt

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "TaskConfig":
        if (self.kind == "choice") != (self.choices is not None):
            raise ValueError("`choices` and `kind: choice` belong together")
        if self.kind == "choice" and (self.prompt is None or self.answer is None):
            raise ValueError("kind: choice needs `prompt` and `answer`")
        if self.prompt is None and (self.answer is not None or self.shots is not None or not self.chat):
            raise ValueError("`answer`, `shots` and `chat: false` need a `prompt`: without it rows are conversations")
        if self.system is not None and (not self.chat or self.prompt is None):
            raise ValueError("`system` needs `chat` and a `prompt`")
        if self.kind != "generate" and self.stop:
            raise ValueError("`stop` is for `kind: generate`")
        return self

    @property
    def prompts(self) -> tuple[str, ...]:
        """The templates; none where rows are conversations."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt or ()

    @property
    def between(self) -> str:
        return ("" if self.chat else " ") if self.separator is None else self.separator


@dataclass(frozen=True)
class Item:
    """A row of a task, in every way in which it is asked."""

    where: str
    prompts: tuple[tuple[Message, ...], ...]
    """What is said before the answer, one for each template. Without `chat`: one message, the text."""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    group: Hashable | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, text: str, template: int) -> Answer:
        return Answer(text, self.references, self.prompts[template][-1].content, self.fields, self.where)


@dataclass(frozen=True)
class Task:
    """Items, and what their outcomes are measured by."""

    name: str
    config: TaskConfig
    items: Sequence[Item]
    metrics: tuple[MetricConfig, ...]

    @property
    def templates(self) -> int:
        return len(self.items[0].prompts)

    @property
    def needs_unconditional(self) -> bool:
        return any(METRICS[metric.name].unconditional for metric in self.metrics)


def read_task(name: str, config: TaskConfig, *, network: bool = False) -> Task:
    """A task with its rows. Raises DataError for rows that lack a field, RecipeError for metrics that do not fit."""
    metrics = metrics_of(name, config)
    if config.prompt is None:
        rows, _ = load_rows(config.rows, network=network)
        items = items_of_rows(rows, config)
    else:
        shots = _shots(config, network)
        items = [_item(config, where, row, shots) for where, row in _records(config.rows, network)]
    return Task(name, config, drawn_items(items, config.limit, config.seed), metrics)


def drawn_items(items: Sequence[Item], limit: int | None, seed: int) -> Sequence[Item]:
    """At most so many items, drawn at random, in their order."""
    if limit is None or limit >= len(items):
        return items
    return [items[number] for number in sorted(Random(seed).sample(range(len(items)), limit))]  # noqa: S311 (no secret)


def metrics_of(name: str, config: TaskConfig) -> tuple[MetricConfig, ...]:
    """The metrics of a task, those of its kind where it names none."""
    builtin = config.rows.partition("/")[0] == BUILTIN and config.prompt is None and config.kind == "generate"
    listed = config.metrics or (("task_score",) if builtin else DEFAULT_METRICS[config.kind])
    found = tuple(metric_of(entry, f"tasks.{name}.metrics") for entry in listed)
    outcome, names = OUTCOMES[config.kind], [shown_name(metric) for metric in found]
    if repeated := next((each for each in names if names.count(each) > 1), None):
        raise RecipeError(
            f"tasks.{name}.metrics: {repeated!r} twice: give one of them a `label`", code="repeated-metric"
        )
    for metric in found:
        if outcome not in METRICS[metric.name].outcomes:
            fit = [each for each, row in METRICS.items() if outcome in row.outcomes]
            raise RecipeError(
                f"tasks.{name}.metrics: {metric.name!r} does not measure `kind: {config.kind}`. These do: "
                f"{', '.join(fit)}",
                code="metric-of-another-kind",
            )
    return found


# Rows ----------------------------------------------------------------------------------------------------------------


def _records(source: str, network: bool) -> list[tuple[str, Mapping[str, Any]]]:
    found = []
    for part in parts_of(source):
        for record in records(part.path, network=network):
            if isinstance(record, Problem):
                raise DataError(f"{record}", code="unusable-rows")
            where, row = record
            if not isinstance(row, Mapping):
                raise DataError(
                    f"{where}: a row is a mapping of fields to values, this is a {type(row).__name__}",
                    code="unusable-rows",
                )
            found.append((where, row))
    if not found:
        raise DataError(f"{source}: holds no rows: in .jsonl a line is a row", code="no-rows")
    return found


def items_of_rows(rows: Sequence[Row], config: TaskConfig) -> list[Item]:
    """Rows of conversations as items: what stands before the last answer is asked, and that answer is the reference."""
    found = []
    for row in rows:
        asked, reference = asked_in(row)
        if reference is None and config.kind == "likelihood":
            raise DataError(f"{row.where}: kind: likelihood needs an answer", code="no-reference-answer")
        # other sources have their first question as group: each is its own
        group = row.group if config.rows.startswith(BUILTIN) else None
        found.append(
            Item(
                row.where,
                (tuple(asked),),
                () if reference is None else (reference,),
                group=group,
                fields={"group": row.group},
                tools=row.tools,
                variables=row.variables,
            )
        )
    return found


def _shots(config: TaskConfig, network: bool) -> list[Item]:
    if config.shots is None:
        return []
    found = _records(config.shots.rows, network)
    if len(found) < config.shots.count:
        raise DataError(
            f"{config.shots.rows}: {len(found)} rows, and {config.shots.count} shots are drawn from them",
            code="too-few-shots",
        )
    drawn = Random(config.shots.seed).sample(found, config.shots.count)  # noqa: S311 (no secret)
    return [_item(replace(config, shots=None), where, row, []) for where, row in drawn]


def _item(config: TaskConfig, where: str, row: Mapping[str, Any], shots: Sequence[Item]) -> Item:
    asked = [filled(template, row, where) for template in config.prompts]
    choices = _choices(config, row, where)
    answers = () if config.answer is None else _values(config.answer, row, where)
    gold = _gold(answers, choices, where) if choices else ()
    references = tuple(choices[number] for number in gold) if choices else tuple(map(_text, answers))
    if config.kind == "likelihood" and not references:
        raise DataError(f"{where}: kind: likelihood needs an `answer`", code="no-reference-answer")
    prompts = tuple(_prompt(config, number, text, shots) for number, text in enumerate(asked))
    group = row.get(config.group)
    return Item(where, prompts, references, choices, gold, None if group is None else _text(group), row)


def _prompt(config: TaskConfig, template: int, text: str, shots: Sequence[Item]) -> tuple[Message, ...]:
    """A question after the shots, asked in the same way, and the system message."""
    before = [(shot.prompts[template][-1].content, shot.references[0]) for shot in shots if shot.references]
    if not config.chat:
        pieces = [f"{question}{config.between}{answer}" for question, answer in before]
        return (Message("user", "\n\n".join([*pieces, text])),)
    system = [] if config.system is None else [Message("system", config.system)]
    said = [Message(role, text) for pair in before for role, text in zip(("user", "assistant"), pair, strict=True)]
    return (*system, *said, Message("user", text))


def _choices(config: TaskConfig, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if config.choices is None:
        return ()
    if isinstance(config.choices, str):
        found = tuple(map(_text, _values(config.choices, row, where)))
    else:
        found = tuple(filled(each, row, where) for each in config.choices)
    if len(found) < 2:
        raise DataError(f"{where}: {len(found)} choices: a choice is among two at least", code="too-few-choices")
    return found


def _gold(answers: Sequence[Any], choices: Sequence[str], where: str) -> tuple[int, ...]:
    """The numbers of the right choices. As in lm-eval a number is that of a choice, and a text is that of one; a text
    that is none of them may be a number too (files of columns know no numbers)."""
    found = []
    for answer in answers:
        text = _text(answer)
        if isinstance(answer, str) and text in choices:
            found.append(choices.index(text))
        elif text.isdecimal() and int(text) < len(choices):
            found.append(int(text))
        else:
            raise DataError(
                f"{where}: the answer {text!r:.60} is none of the choices {list(choices)}, nor a number from 0 to "
                f"{len(choices) - 1}",
                code="answer-not-a-choice",
            )
    return tuple(dict.fromkeys(found))


def _values(template: str, row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """Of a template that is one field: its value, or the values of its list. Else the filled template alone."""
    match = FIELD.fullmatch(template)
    value = row.get(match[1]) if match and match[1] is not None else None
    if value is None:
        return (filled(template, row, where),)
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def filled(template: str, row: Mapping[str, Any], where: str) -> str:
    """A template with the row's fields; DataError for a field that the row has not."""

    def word(match: Any) -> str:
        if match[1] is None:
            return str(match[0][0])
        if row.get(match[1]) is None:
            raise DataError(
                f"{where}: no field {match[1]!r}, which the task names. {nearest(match[1], row)} A brace that stands "
                "for itself is written twice",
                code="no-such-field",
            )
        return _text(row[match[1]])

    return FIELD.sub(word, template)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
