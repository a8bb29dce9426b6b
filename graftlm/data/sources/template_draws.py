"""Rows of `templates` in a run of several epochs: each epoch asks them in another way.

A row that k templates fit is asked in each of them once in k epochs, in an order drawn from the seed
(`prompt_templates.ask`).
All that a run will ask is rendered before it begins, each rendering once, so nothing can turn out to be too long or
wrong in the middle of it, and what a step sees follows from files, recipe and seed alone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.data.batches.pack import Example, Group
from graftlm.data.quality.report import Report
from graftlm.data.sources.load import stream_rows
from graftlm.data.sources.source import DataConfig, Row, SourceConfig
from graftlm.errors import DataError

Ready = Callable[[Sequence[Row], DataConfig], tuple[Sequence[Example | Group], Sequence[Row], Report]]
"""Rows -> (what is trained on, the rows that it is made of, the report)."""


@dataclass(frozen=True)
class Draws:
    """Which example each of N rows is in each epoch."""

    examples: NDArray[np.int64]
    """[K, N]: the example that each row is in the first K epochs; in the first of them it is the row's own number."""
    periods: NDArray[np.int64]
    """[N]: after so many epochs, K at most, a row is asked as in the first one again."""

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        return len(self.periods)

    def of(self, plan: Sequence[Sequence[int]]) -> list[list[int]]:
        """The examples of each step of a plan of rows, whose epochs come one after the other."""
        found, rows_before = [], 0
        for step in plan:
            rows = np.array(step, np.int64)
            epochs = (rows_before + np.arange(len(rows))) // self.count
            found.append(self.examples[epochs % self.periods[rows], rows].tolist())
            rows_before += len(rows)
        return found


def draw_again(
    data: DataConfig,
    rows: Sequence[Row],
    examples: Sequence[Example | Group],
    ready: Ready,
    *,
    epochs: int,
    seed: int,
    network: bool,
) -> tuple[list[Example | Group], Draws | None, list[str]]:
    """(what later epochs ask and the first does not, which example each row is in each epoch, notes) for the examples
    of a first epoch, which are of these rows. None where every epoch asks the same.

    A rendering that cannot be used is left out, and that epoch asks as the first does. Raises DataError for one where
    `data` asks for it: `strict`, or over_length `error`.
    """
    sources = [source for source in data.sources() if len(source.templates) > 1]
    epochs = min(epochs, max((len(source.templates) for source in sources), default=1))
    if epochs < 2:
        return [], None, []
    first: dict[str, int | None] = {row.where: row.template for row in rows if row.template is not None}
    later_epochs, notes = _rows_of_later_epochs(data, sources, first, epochs=epochs, seed=seed, network=network)
    templates_by_epoch: list[dict[str, int | None]] = [
        first,
        *({where: row.template for where, row in epoch.items()} for epoch in later_epochs),
    ]
    periods = {where: _period([epoch.get(where) for epoch in templates_by_epoch]) for where in first}

    new_examples: list[Example | Group] = []
    places: dict[tuple[str, int | None], int] = {}
    new = {(row.where, row.template): row for epoch in later_epochs for row in epoch.values()}
    new = {(where, template): row for (where, template), row in new.items() if template != first[where]}
    for template in dict.fromkeys(template for _, template in new):  # a place has one rendering of each template
        some = [row for (_, own), row in new.items() if own == template]
        try:
            found, _, report = ready(some, data)
        except DataError as error:  # none of them can be used
            if data.strict or data.over_length == "error":
                raise
            found, report = [], Report(problems=[str(error)])
        notes += report.problems
        for example in found:
            places[example.where, template] = len(examples) + len(new_examples)
            new_examples.append(example)
    if left_out := len(new) - len(places):
        notes.append(f"{left_out:,} renderings for later epochs cannot be used: these rows are asked as in the first")
    notes.append(
        f"templates: {len(new_examples):,} more rows are rendered, as later epochs ask in other ways than the first"
    )
    numbers = [
        [places.get((example.where, epoch.get(example.where)), own) for own, example in enumerate(examples)]
        for epoch in templates_by_epoch
    ]
    return (
        new_examples,
        Draws(np.array(numbers, np.int64), np.array([periods.get(e.where, 1) for e in examples])),
        notes,
    )


def _period(templates: Sequence[int | None]) -> int:
    """After how many epochs the first template comes again."""
    again = (epoch for epoch, template in enumerate(templates) if epoch and template == templates[0])
    return next(again, len(templates))


def _rows_of_later_epochs(
    data: DataConfig,
    sources: Sequence[SourceConfig],
    first: dict[str, int | None],
    *,
    epochs: int,
    seed: int,
    network: bool,
) -> tuple[list[dict[str, Row]], list[str]]:
    """(the rows that each epoch but the first asks, by their place; notes). A place in two sources does not tell which
    row is meant: such rows are left out."""
    found: list[dict[str, Row]] = []
    several: set[str] = set()
    for epoch in range(1, epochs):
        rows: dict[str, Row] = {}
        times: Counter[str] = Counter()
        for source in sources:
            how: dict[str, Any] = {"network": network, "turn_order": data.turn_order, "seed": seed, "epoch": epoch}
            for row in stream_rows(source, **how):
                if isinstance(row, Row) and row.where in first:
                    rows[row.where] = row
                    times[row.where] += 1
        several |= {where for where, count in times.items() if count > 1}
        found.append(rows)
    found = [{where: row for where, row in rows.items() if where not in several} for rows in found]
    notes = [f"{len(several):,} rows stand in two sources with templates: every epoch asks them alike"]
    return found, notes if several else []
