"""What a task is, and how it becomes rows.

A template is one way of asking: a phrase for each slot of `ask`, and a layout that says where the input stands. Each
input occurs once in a task, and the group of a row is its template, so that a split by groups (`splits.split`) shares
neither a template nor an input between training and held-out rows.
"""

from collections.abc import Callable
from itertools import product
from random import Random
from typing import Literal, NamedTuple

LAYOUTS = (
    "{ask}: {given}",
    "{ask}.\n{given}",
    "{given}\n\n{ask}.",
    "{ask}.\n\nInput: {given}\nOutput:",
    "Input: {given}\n{ask}.",
)
"""Five, which has no divisor in common with the four phrases of a slot: each phrase occurs in every layout."""
ROWS_OF_A_TEMPLATE = 8
TRIES = 100
"""An example is drawn so often, at most, for each row that a task has."""


class Task(NamedTuple):
    ask: tuple[tuple[str, ...], ...]
    """The phrases of each slot; an instruction is one of each, in their order, without a full stop."""
    example: Callable[[Random], tuple[str, str]]
    """Draws (input, answer)."""
    answer: Literal["text", "json", "sql"] = "text"
    """The form in which two answers are compared."""

    def templates(self) -> list[str]:
        """Texts with a place for `{given}`."""
        asks = (" ".join(phrases) for phrases in product(*self.ask))
        return [LAYOUTS[number % len(LAYOUTS)].replace("{ask}", ask) for number, ask in enumerate(asks)]


def rows_of(name: str, task: Task, seed: int = 0) -> list[dict[str, str]]:
    """{prompt, completion, group: NAME/NUMBER OF THE TEMPLATE}: as many rows of every template, which take turns."""
    draw = Random(f"{seed} {name}")  # noqa: S311 (rows are no secret)
    templates = task.templates()
    count = ROWS_OF_A_TEMPLATE * len(templates)
    examples: dict[str, str] = {}
    for _ in range(TRIES * count):
        if len(examples) == count:
            break
        question, answer = task.example(draw)
        examples.setdefault(question, answer)
    assert len(examples) == count, f"{name}: only {len(examples)} inputs are distinct, {count} are needed"
    return [
        {
            "prompt": templates[number % len(templates)].replace("{given}", question),
            "completion": answer,
            "group": f"{name}/{number % len(templates)}",
        }
        for number, (question, answer) in enumerate(examples.items())
    ]


def task_of(group: str) -> str:
    """The name of the task that a row's group belongs to."""
    return group.partition("/")[0]
