"""Where rows come from, and which of them are held out.

Files are read strictly and in one pass: a row that cannot be used is left out, and reported as `file:line: reason`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, Strict, field_validator

from graftlm.config.schema import Count, Flag, PositiveCount, PositiveRate, Share, Weight, config
from graftlm.config.template_variables import check_variables
from graftlm.data.chat.turn_order import TurnOrder, in_order
from graftlm.data.sources import axolotl, llama_factory
from graftlm.data.sources.fields import Tracked, Unread, unread
from graftlm.data.sources.formats import FORMATS, TEXT, Conversation, Message, RowError, check, detect
from graftlm.data.sources.messages import read_number, refuse_media
from graftlm.data.sources.nulls import clean_calls, clean_tools
from graftlm.data.sources.other_trainers import Part
from graftlm.data.sources.prompt_templates import Template, ask
from graftlm.data.sources.records import Problem, expanded, files, records
from graftlm.errors import DataError, numbered


@config
class SourceConfig:
    path: str
    """A .jsonl, .json, .csv, .tsv, .parquet or .arrow file, .jsonl.gz and so on; a pattern (`data/*.jsonl`) or a folder
    of such files; `hub:org/name[@subset][:split]`; `builtin:docstrings`; or what another trainer describes:
    `dataset_info.json:NAME` (LLaMA-Factory) or a .yaml file with `datasets:` (Axolotl)."""
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
    templates: tuple[Template, ...] = ()
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


SAME = "says the same as"
AHEAD = 100
"""Rows that decide the format of a file."""


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


def load_rows(
    source: str | SourceConfig,
    *,
    network: bool = False,
    strict: bool = False,
    problems: list[Problem] | None = None,
    score: str | None = None,
    turn_order: TurnOrder = "refuse",
    seed: int = 0,
) -> tuple[list[Row], str]:
    """All rows of a source that can be used, and the name of their format.

    `problems` receives what is wrong with rows, those that are left out and those that stay. Raises DataError, which
    lists rows by file and line, where no row can be used, and for any row that cannot be used where there is no such
    list or under `strict`. `score` names a field that must hold a number. `seed` draws among `templates`.
    """
    path = source if isinstance(source, str) else source.path
    rows: list[Row] = []
    all_problems: list[Problem] = []
    formats: list[str] = []
    seen: dict[int, Row] = {}
    how: dict[str, Any] = {"network": network, "score": score, "turn_order": turn_order, "seed": seed}
    for found in stream_rows(source, formats=formats, **how):
        if isinstance(found, Problem):
            all_problems.append(found)
            continue
        rows.append(found)
        first = seen.setdefault(hash(tuple((m.role, m.content) for m in found.messages)), found)
        if first is not found and _same(first, found):
            all_problems.append(Problem(found.where, f"{SAME} {first.where}", left_out=False))
    name = ", ".join(formats)
    out = [str(problem) for problem in all_problems if problem.left_out]
    if out and (problems is None or strict or not rows):
        raise DataError(
            f"{len(out)} rows of {path} cannot be used ({len(rows)} can; the format is {name or 'not known'}):\n"
            + numbered(out)
        )
    if not rows:
        raise DataError(f"{path}: holds no rows: in .jsonl a line is a row, in .csv a line below the header")
    if problems is not None:
        problems += all_problems
    return rows, name


def stream_rows(
    source: str | SourceConfig,
    *,
    network: bool = False,
    formats: list[str] | None = None,
    score: str | None = None,
    turn_order: TurnOrder = "refuse",
    seed: int = 0,
    epoch: int = 0,
) -> Iterator[Row | Problem]:
    """Rows and problems of a source in the order of its files, one at a time, so that memory does not grow with them.
    Names of formats go into `formats` as they are met. `templates` are drawn by `seed`, anew for each `epoch`."""
    if isinstance(source, str):
        source = SourceConfig(path=source)
    for part in _parts(source.path):
        yield from (Problem(source.path, note, left_out=False) for note in part.notes)
        name = source.format if part.format == "auto" else part.format
        name = "prompt-completion" if source.templates and name == "auto" else name
        found = _instances(records(part.path, network=network))
        ahead = list(islice(found, AHEAD)) if name == "auto" else []
        name = _format_of(part, ahead) if name == "auto" else name
        known: dict[Unread, Unread] = {}
        for where, record in chain(ahead, found):
            if isinstance(record, Problem):
                yield record
                continue
            try:
                if not isinstance(record, dict):
                    several = " (a file that is one list of rows ends in .json)" if isinstance(record, list) else ""
                    raise RowError(
                        f"a row is a mapping of fields to values, this is a {type(record).__name__}{several}"
                    )
                tracked = Tracked(record)
                fields = part.reshape(tracked)
                asked = None
                if source.templates:
                    fields, asked = ask(source.templates, fields, seed, epoch)
                name = detect({**fields}) if name == "auto" else name  # of a copy: to look is not to use
                fields = fields if isinstance(fields, Tracked) else Tracked(fields)
                if formats is not None and name not in formats:
                    formats.append(name)
                if name != "text":
                    refuse_media(fields)
                row, notes = _row(FORMATS[name](fields), where, tracked, score, turn_order)
                ignored = unread(tracked, *([fields] if fields is not tracked else []))
                if ignored or asked is not None:
                    row = replace(row, unread=known.setdefault(ignored, ignored), template=asked)
            except RowError as error:
                yield Problem(where, f"{error}{_otherwise(record, part, source, name)}")
                continue
            yield row
            yield from (Problem(where, note, left_out=False) for note in notes)


def _otherwise(record: Any, part: Part, source: SourceConfig, name: str) -> str:
    """A sentence on a row that cannot be used because its format is not that of its file; else empty."""
    if isinstance(record, dict) and name != "auto" and (source.format, part.format) == ("auto", "auto"):
        with suppress(RowError):
            own = detect(part.reshape(record))
            if own != name and not source.templates:
                return f" (the row is of the format {own!r}, its file {name!r}: give it a file of its own)"
    return ""


def _parts(path: str) -> list[Part]:
    return [replace(part, path=one) for part in _described(path) for one in expanded(part.path)]


def _described(path: str) -> list[Part]:
    """The file itself, or the files that `dataset_info.json:NAME` or an Axolotl .yaml describes."""
    file, colon, name = path.rpartition(":")
    if colon and file.endswith(".json"):
        return [llama_factory.part(Path(file).expanduser(), name)]
    if path.endswith((".yaml", ".yml")):
        return axolotl.parts(Path(path).expanduser())
    return [Part(path)]


def content(path: str) -> str | None:
    """The SHA-256 (64 hexadecimal digits) of all files of a source and of what describes them; None for a source that
    has no files on this machine."""
    described = path.rpartition(":")[0] if path.rpartition(":")[0].endswith(".json") else path
    digest = hashlib.sha256()
    names = dict.fromkeys(part.path for part in _parts(path))
    if described != path or path.endswith((".yaml", ".yml")):
        names = dict.fromkeys([described, *names])
    for file in chain.from_iterable(map(files, names)):
        if not file.is_file():
            return None
        digest.update(f"{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            while some := stream.read(2**20):
                digest.update(some)
    return digest.hexdigest()


def _format_of(part: Part, ahead: Sequence[tuple[str, Any]]) -> str:
    """The format that most of the first rows have, so that a damaged row does not decide for a file."""
    votes: Counter[str] = Counter()
    for _, record in ahead:
        if isinstance(record, dict):
            with suppress(RowError):
                votes[detect(part.reshape(record))] += 1
    return votes.most_common(1)[0][0] if votes else "auto"


def _row(
    conversation: Conversation, where: str, record: Mapping[str, Any], score: str | None, turn_order: TurnOrder
) -> tuple[Row, list[str]]:
    """(the checked row, notes on it)"""
    group = record.get("group")
    messages, notes = in_order(conversation.messages, turn_order)
    rejected = tuple(in_order(other, turn_order)[0] for other in conversation.rejected)
    conversation = replace(conversation, messages=messages, rejected=rejected)
    if conversation.tools or conversation.rejected or any(message.tool_calls for message in conversation.messages):
        tools = clean_tools(conversation.tools)
        rejected = tuple(clean_calls(other, tools) for other in conversation.rejected)
        conversation = replace(
            conversation, messages=clean_calls(conversation.messages, tools), tools=tools, rejected=rejected
        )
    notes += _checked(conversation.messages, asks=conversation.asks)
    for number, other in enumerate(conversation.rejected, start=1):
        try:
            _checked(other)
        except RowError as error:
            raise RowError(f"rejected answer {number}: {error}") from None
    if group is None or group == "":
        group = next((m.content for m in conversation.messages if m.role == "user"), conversation.messages[0].content)
    value = None
    if score is not None:
        try:
            value = read_number(record, score)
        except RowError as error:
            raise RowError(f"data.order: by {score}: {error}") from None
    return Row(
        conversation.messages,
        where,
        str(group),
        conversation.tools,
        conversation.rejected,
        conversation.desirable,
        value,
        _variables(record),
    ), notes


def _checked(messages: list[Message], *, asks: bool = False) -> list[str]:
    """The notes of `check`; its error says which `turn_order` would help, where the order of turns is wrong."""
    try:
        return check(messages, asks=asks)
    except RowError as error:
        if hint := _hint(messages, asks):
            raise RowError(f"{error}. {hint}") from None
        raise


def _hint(messages: list[Message], asks: bool) -> str:
    """Which `turn_order` would read the row, and how; empty where none would."""
    for how in get_args(TurnOrder):
        other, done = in_order(messages, how)
        with suppress(RowError):
            if done:
                check(other, asks=asks)
                return f"`data: {{turn_order: {how}}}` would read it: {done[0]}"
    return ""


def _variables(record: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the chat template that a row sets, under our name for them or transformers'."""
    names = [name for name in ("template_variables", "chat_template_kwargs") if record.get(name)]
    if len(names) > 1:
        raise RowError("template_variables and chat_template_kwargs are two names of the same field: give one")
    found = record[names[0]] if names else {}
    if isinstance(found, str):
        with suppress(ValueError):
            found = json.loads(found)
    if not isinstance(found, dict):
        raise RowError(f"field {names[0]!r} must be a mapping of names to values, this is {found!r:.60}")
    try:
        check_variables(found)
    except ValueError as error:
        raise RowError(f"field {names[0]!r}: {error}") from None
    return found


def _instances(found: Iterator[tuple[str, Any] | Problem]) -> Iterator[tuple[str, Any]]:
    """A task of Super-NaturalInstructions is one record with many instances; each is a row."""
    for one in found:
        if isinstance(one, Problem):
            yield one.where, one
            continue
        where, record = one
        if not isinstance(record, Mapping) or not isinstance(record.get("Instances"), list):
            yield one
            continue
        task = {key: value for key, value in record.items() if key != "Instances"}
        for number, instance in enumerate(record["Instances"], start=1):
            yield f"{where}: instance {number}", task | instance if isinstance(instance, dict) else instance


def _same(first: Row, second: Row) -> bool:
    return (
        first.messages == second.messages
        and first.tools == second.tools
        and first.rejected == second.rejected
        and first.desirable == second.desirable
    )


def for_supervised(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """(the rows whose answers should be imitated, notes on the others)"""
    if rows and not any(message.role in ("assistant", TEXT) for row in rows for message in row.messages):
        raise DataError(
            "the rows only ask, and loss `supervised` needs answers to imitate: give rows with answers, or let the "
            "model answer by itself with `online` in a recipe"
        )
    liked = [row for row in rows if row.desirable is not False]
    if not liked:
        raise DataError("every answer is marked as not liked: loss `supervised` would train the model to give them")
    notes = []
    if len(liked) < len(rows):
        notes.append(f"{len(rows) - len(liked)} rows whose answer was not liked are left out by loss `supervised`")
    if pairs := sum(bool(row.rejected) for row in liked):
        notes.append(f"{pairs} rows have rejected answers, which loss `supervised` does not use: it trains the chosen")
    return liked, notes


def every_row(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """All rows, where their use is not known."""
    return list(rows), []


def split(rows: Sequence[Row], held_out: int | float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held out): whole groups in an order drawn from the seed are held out until there are enough rows.

    Exactly `held_out` rows (or that share, and then at least one) are kept; chosen rows that are too many are on
    neither side. Groups of more than a tenth of what is wanted come last, so that the held-out rows are not all of one
    kind.
    """
    wanted = held_out if isinstance(held_out, int) else max(1, round(held_out * len(rows))) if held_out else 0
    if wanted == 0:
        return list(rows), []
    sizes = Counter(row.group for row in rows)
    drawn = {group: hashlib.sha256(f"{seed}:{group}".encode()).digest() for group in sizes}
    order = sorted(sizes, key=lambda group: (sizes[group] > max(1, wanted // 10), drawn[group]))
    chosen: set[str] = set()
    count = 0
    for group in order:
        if count >= wanted:
            break
        chosen.add(group)
        count += sizes[group]
    train = [row for row in rows if row.group not in chosen]
    if count < wanted or not train:
        raise DataError(
            f"held_out: {wanted} of {len(rows)} rows in {len(sizes)} groups leave nothing to train on: hold out fewer, "
            "or make smaller groups (a row's `group`, or else its first question, is never on both sides)"
        )
    return train, [row for row in rows if row.group in chosen][:wanted]
