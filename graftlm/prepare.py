"""From a recipe to its rows: read, split, chosen, rendered and checked."""

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rich.console import Console

from graftlm.data.batches.groups import COMPARED, prepare_groups, usable_by
from graftlm.data.batches.order import Curriculum, curriculum
from graftlm.data.batches.pack import Example, Group, fill, saved_by_sharing
from graftlm.data.batches.prompts import asked_in, prepare_prompts, shown_prompts
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.preflight import prepare, shown_rows
from graftlm.data.quality.report import Report
from graftlm.data.quality.survey import notes_beyond_survey, survey
from graftlm.data.sources.mixing import Data
from graftlm.data.sources.row_cache import read_cached, unread_keys
from graftlm.data.sources.source import DataConfig, Row, SourceConfig
from graftlm.data.sources.template_draws import Draws, draw_again
from graftlm.files import cache_folder
from graftlm.hub.sketch import Positions
from graftlm.losses import LOSSES
from graftlm.recipe import Recipe
from graftlm.selection.choose import SelectorResult, choose
from graftlm.training.inner_split import check_inner_loss, inner_split
from graftlm.training.phases import count_steps, make_batches
from graftlm.training.positions import check_positions

SHARING_STEPS = 100
"""Steps of the run over which the saving by shared beginnings is counted."""

Items = Sequence[Example | Group]
Ready = Callable[..., tuple[Items, Sequence[Row], Report]]
"""Rows -> (what the loss trains on, the rows that it is made of, the report)."""


@dataclass(frozen=True)
class Prepared:
    """The rows of a run, rendered: what `graft data check` reports and `train` trains on."""

    rows: Sequence[Row]
    examples: Sequence[Example | Group]
    """What a step is made of: rows, or groups of answers where the loss compares them. Those of a first epoch come
    before what `draws` has for later ones."""
    report: Report
    held_out_rows: Sequence[Row]
    held_out: Sequence[Example | Group]
    first_rows: list[dict[str, Any]]
    renderer: Renderer
    """What has rendered the rows: with the template, the day and the turn order of the run."""
    chosen: list[str] = field(default_factory=list)
    """What each selector of the recipe did, a line each."""
    inner_rows: Sequence[Example | Group] = field(default_factory=list)
    """The inner validation split: rows that are not in `examples`, for callbacks that learn from them."""
    statistics_rows: Sequence[Example | Group] = field(default_factory=list)
    """What inits and methods gather statistics from; none where they use the first training rows."""
    curriculum: Curriculum | None = None
    """The order of `examples` in an epoch; None where every epoch is shuffled."""
    draws: Draws | None = None
    """Which of `examples` each row is in each epoch; None where every epoch has the same."""
    positions: Positions | None = None
    """The positions of the base."""

    @property
    def first_epoch(self) -> Sequence[Example | Group]:
        """The examples of a first epoch."""
        return self.examples if self.draws is None else self.examples[: self.draws.count]


def prepare_data(
    recipe: Recipe,
    tokenizer: Any,
    *,
    show: int = 1,
    look: bool = False,
    console: Console | None = None,
    today: datetime.date | None = None,
) -> Prepared:
    """Read, split, choose, render and check the rows of a recipe.

    With `look` the rows themselves are looked at too (`report.survey`), which takes longer than rendering them. `today`
    is the day for chat templates that write the date. Raises DataError where no row can be used, and under `strict`
    where one cannot.
    """
    # Over 60 lines: the way from recipe to rows, a step a line, in one place; each step is a function.
    data, loss, train = recipe.data, recipe.loss, recipe.train
    needs = "prompts" if recipe.rl else LOSSES[loss.name].rows
    cached, usable = cache_folder() / "rows", usable_by(loss.name, needs, data)
    reading: dict[str, Any] = {"seed": train.seed, "network": recipe.network, "needs": needs, "usable": usable}
    source_data = read_cached(data, folder=cached, **reading)
    rows, held_out_rows = source_data.train, source_data.held_out
    rows, choices = select_rows(recipe, rows, tokenizer, console, today) if recipe.select else (rows, [])
    renderer = Renderer(tokenizer, turn_order=data.turn_order, today=today)
    ready: Ready = partial(_ready, needs, renderer, workers=train.threads, cache=cached)
    room = recipe.rl.max_new_tokens if recipe.rl else 0
    learnable: Ready = partial(_prompts, renderer, room) if recipe.rl else ready
    check = partial(check_positions, recipe.base, network=recipe.network, room=room)
    examples, rows, report = learnable(rows, data, format=source_data.format)
    report.problems[:0] = source_data.problems
    report.notes += source_data.notes  # often one for each row: after what concerns all
    positions = check(examples, report)
    examples, inner_rows = inner_split(examples, recipe.inner_share(), loss=loss, seed=train.seed)
    rows_of_source = partial(
        _rows_of_source, recipe.data, partial(read_cached, folder=cached, **reading), ready, check, report
    )
    if data.inner_rows is not None:
        check_inner_loss(loss)
        inner_rows = rows_of_source(data.inner_rows, "inner rows")
    statistics_rows = [] if recipe.statistics is None else rows_of_source(recipe.statistics.rows, "statistics rows")
    order = curriculum(data.order, rows, examples) if data.order else None
    epochs = math.ceil(count_steps(train, len(examples)) * train.batch_rows / len(examples))
    drawing: dict[str, Any] = {"epochs": epochs, "seed": train.seed, "network": recipe.network}
    more, draws, notes = draw_again(data, rows, examples, learnable, **drawing)
    report.notes += notes
    check(more, report, what="rows of later epochs")
    examples = [*examples, *more]
    if data.pack and not recipe.rl:
        _count_packs(recipe, examples, order, draws, report)
    held_out, held_out_rows = _held_out(recipe, held_out_rows, ready, report)
    if held_out:
        check_positions(recipe.base, held_out, report, network=recipe.network, what="held-out rows")
    if look:
        report.survey = survey(rows, held_out_rows)
        report.notes = notes_beyond_survey(report.notes, report.survey)
    first_rows = shown_prompts(examples, renderer, show) if recipe.rl else shown_rows(rows, renderer, data, show)
    return Prepared(
        rows,
        examples,
        report,
        held_out_rows,
        held_out,
        first_rows,
        renderer,
        chosen=[choice.line() for choice in choices],
        inner_rows=inner_rows,
        statistics_rows=statistics_rows,
        curriculum=order,
        draws=draws,
        positions=positions,
    )


def select_rows(
    recipe: Recipe,
    rows: Sequence[Row],
    tokenizer: Any,
    console: Console | None = None,
    today: datetime.date | None = None,
) -> tuple[list[Row], list[SelectorResult]]:
    """The rows that the recipe's selectors keep, and what each selector did. Raises as `choose` does."""
    return choose(
        recipe.select,
        rows,
        tokenizer,
        console or Console(quiet=True),
        base=recipe.base,
        data=recipe.data,
        pack_tokens=recipe.train.pack_tokens,
        network=recipe.network,
        today=today,
    )


def _ready(
    needs: str, renderer: Renderer, rows: Sequence[Row], data: DataConfig, **options: Any
) -> tuple[Items, Sequence[Row], Report]:
    if needs in COMPARED:
        return prepare_groups(rows, renderer, data, needs, **options)
    examples, report = prepare(rows, renderer, data, **options)
    return examples, _usable(rows, examples, report), report


def _prompts(
    renderer: Renderer, room: int, rows: Sequence[Row], data: DataConfig, *, format: str = ""
) -> tuple[Items, Sequence[Row], Report]:
    return prepare_prompts(rows, renderer, data, room=room, format=format)


def _usable(rows: Sequence[Row], examples: Sequence[Example], report: Report) -> Sequence[Row]:
    """The rows without those that the template refused or that would have taught nothing."""
    if not report.problems:
        return rows
    places = {example.where for example in examples} | set(report.dropped_over_length)
    return [row for row in rows if row.where in places]


def _count_packs(
    recipe: Recipe, examples: Items, order: Curriculum | None, draws: Draws | None, report: Report
) -> None:
    """Into the report: how full packs are, and what shared beginnings save."""
    train = recipe.train
    first = make_batches(train, examples, order, draws)[:SHARING_STEPS]
    steps = [[examples[i] for i in step] for step in first]
    report.shared_share = saved_by_sharing(steps, train.pack_tokens) if train.prefix_sharing else None
    report.pack_fill = fill(steps, train.pack_tokens, share=train.prefix_sharing)


def _rows_of_source(
    data: DataConfig,
    reading: Callable[[DataConfig], Data],
    ready: Ready,
    check: Callable[..., Any],
    report: Report,
    source: str | SourceConfig,
    what: str,
) -> list[Example | Group]:
    """The rows of a separate source, read, rendered and checked as training rows. `what` names them in the report."""
    own = replace(data, train=source, held_out=0, order=None, desirable_share=None)
    source_data = reading(own)
    items, _, found = ready(source_data.train, own, format=source_data.format)
    report.problems += [*source_data.problems, *found.problems]
    report.notes += [f"{what}: {line}" for line in [*found.notes, *source_data.notes]]
    check(items, report, what=what)
    return list(items)


def _held_out(recipe: Recipe, rows: Sequence[Row], ready: Ready, report: Report) -> tuple[Items, Sequence[Row]]:
    """Held-out rows, rendered. Every one counts: one that is too long is cut, not dropped. Under online RL those
    without an answer have no loss and are asked only."""
    answer_rows = [row for row in rows if asked_in(row)[1] is not None] if recipe.rl else rows
    if not answer_rows:
        return [], rows
    held_out, answer_rows, found = ready(answer_rows, replace(recipe.data, over_length="truncate"))
    rows = rows if recipe.rl else answer_rows
    report.problems += found.problems
    if not isinstance(recipe.data.held_out, int | float):  # else its rows have the keys of the others
        report.notes += [f"held-out rows: {line}" for line in unread_keys(rows)]
    return held_out, rows
