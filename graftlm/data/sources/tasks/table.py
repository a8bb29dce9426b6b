"""TASKS: name -> task; and the rows of one of them or of all."""

from pathlib import Path

from graftlm.data.sources.tasks import classify, code, grammar, numbers, records, sql, text
from graftlm.data.sources.tasks.task import Task, rows_of

TASKS: dict[str, Task] = {
    **text.TASKS,
    **grammar.TASKS,
    **records.TASKS,
    **numbers.TASKS,
    **classify.TASKS,
    **code.TASKS,
    **sql.TASKS,
}


def rows(name: str, seed: int = 0) -> list[dict[str, str]]:
    """The rows of one task: {prompt, completion, group}."""
    return rows_of(name, TASKS[name], seed)


def every_row(seed: int = 0) -> list[dict[str, str]]:
    """The rows of all tasks, which take turns."""
    return [row for turn in zip(*(rows(name, seed) for name in TASKS), strict=True) for row in turn]


def files() -> list[Path]:
    """The files that the rows are made from."""
    return sorted(Path(__file__).parent.glob("*.py"))
