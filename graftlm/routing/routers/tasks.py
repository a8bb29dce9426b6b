"""LoRAuter: Dhasade et al. 2026, arXiv:2601.21795.

    best(t) = the adapter with the highest score on a few rows of task t        scored once
    E_t = mean of E(row) over the rows of task t
    g = softmax(cos(E(prompt), E_t) / temperature) over the top_k nearest tasks; task t stands for best(t)

It asks which task a request is of, not which adapter, so nothing need be known about the rows that an adapter was
trained on, and the work for a request depends on the number of tasks alone. The base may be the best of a task.

Departures. The score is -1 times the loss of the answers, or any function (`Library.score`). E is the mean of the
base's last hidden states less what all tasks have in common (`nearest.py`); the paper has a sentence encoder.
Not checked against the paper beyond its abstract: how several tasks are weighted, and how the search for best(t) is
made cheaper for large libraries. Here every adapter sees every row.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from graftlm.config.schema import Count, Flag, PositiveCount, PositiveRate, config
from graftlm.errors import RecipeError
from graftlm.routing.base import RequestRouter, RouterConfig
from graftlm.routing.library import Library
from graftlm.routing.nearest import Centroids


@config
class TasksConfig(RouterConfig):
    name: Literal["tasks"] = "tasks"
    tasks: dict[str, str] = Field(default_factory=dict)
    """Task -> a few of its rows with answers, as `data.train` names them."""
    examples: PositiveCount = 20
    """Rows of each that are looked at."""
    top_k: PositiveCount = 1
    """Tasks that a request is taken for."""
    temperature: PositiveRate = 0.2
    """Of their weights."""
    base: Flag = True
    """Whether the base may be the best of a task, beside the adapters."""
    seed: Count = 0
    """Of the rows that are drawn."""


class Tasks(RequestRouter):
    paper = "Dhasade et al. 2026, arXiv:2601.21795"
    grain = "task"

    def prepare(self, library: Library) -> None:
        config = self.config
        names = [*library.given, *(name for name in config.tasks if name not in library.given)]
        if not names:
            raise RecipeError(
                "tasks: this router needs rows of some tasks. Name them, for example {name: tasks, tasks: {sums: "
                "sums.jsonl}}",
                code="no-rows-for-router",
            )
        rows = {name: library.examples(name, config.tasks, config.examples, config.seed) for name in names}
        self.centroids = Centroids(library, rows)
        candidates: list[str | None] = [*library.names, *([None] if config.base else [])]
        self.scores = {task: {one: library.score(one, rows[task]) for one in candidates} for task in names}
        self.best = {task: max(candidates, key=found.__getitem__) for task, found in self.scores.items()}

    def weights(self, ids: Sequence[int]) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for task, weight in self.centroids.weights(ids, self.config.top_k, self.config.temperature).items():
            if (adapter := self.best[task]) is not None:
                found[adapter] = found.get(adapter, 0.0) + weight
        return found
