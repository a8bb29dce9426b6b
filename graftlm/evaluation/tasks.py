"""Whether an answer to a row of `builtin:tasks` is right: 1 or 0, by what its task compares answers as.

    text    equal without white space at either end
    json    equal as JSON: spaces and the order of keys do not count, types do (1 is not 1.0, and not true)
    sql     equal rows on every database of the task; their order counts where the row's own query orders them

A query runs in memory, may only read, and is given up after STEPS instructions of SQLite's machine.
"""

import json
import sqlite3
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from graftlm.data.sources.source import Row
from graftlm.data.sources.tasks.sql import DATABASES, database
from graftlm.data.sources.tasks.table import TASKS
from graftlm.data.sources.tasks.task import task_of
from graftlm.errors import DataError, nearest

STEPS = 1_000_000
"""A query of the task takes less than a thousand."""
READS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
FUNCTIONS = ("count", "sum", "total", "avg", "min", "max", "abs", "round", "lower", "upper", "length", "coalesce")
"""Others may take long in one instruction (`randomblob`), or leave SQL (`load_extension`)."""


def score(row: Row, answer: str) -> float:
    """1 where the answer is as good as the row's own, else 0. The row's group names its task. Raises DataError for a
    row of no task, or without an answer."""
    name = task_of(row.group)
    if name not in TASKS:
        raise DataError(
            f"{row.where}: group {row.group!r:.60} names no task of builtin:tasks, and only these can be scored. "
            f"{nearest(name, TASKS)}",
            code="no-such-task",
        )
    if row.messages[-1].role != "assistant":
        raise DataError(f"{row.where}: the row has no answer to compare with", code="no-reference-answer")
    return float(SAME[TASKS[name].answer](row.messages[-1].content, answer))


def same_text(wanted: str, answer: str) -> bool:
    return answer.strip() == wanted.strip()


def same_json(wanted: str, answer: str) -> bool:
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return json.dumps(found, sort_keys=True) == json.dumps(json.loads(wanted), sort_keys=True)


def same_rows(wanted: str, answer: str) -> bool:
    ordered = "order by" in wanted.lower()
    for number in range(DATABASES):
        try:
            found = _result(number, answer)
        except sqlite3.Error:
            return False
        expected = _result(number, wanted)
        if found != expected if ordered else sorted(map(repr, found)) != sorted(map(repr, expected)):
            return False
    return True


SAME: dict[str, Callable[[str, str], bool]] = {"text": same_text, "json": same_json, "sql": same_rows}
"""What answers are compared as -> (the row's own answer, an answer) -> whether they are the same."""


def _result(number: int, query: str) -> list[tuple[Any, ...]]:
    """The rows that a query gives. Raises sqlite3.Error where it gives none."""
    connection = _database(number)
    left = [STEPS // 1000]

    def stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    connection.set_progress_handler(stop, 1000)
    try:
        return connection.execute(query).fetchall()
    except (sqlite3.Warning, ValueError) as error:  # several statements; a null character, a lone surrogate
        raise sqlite3.ProgrammingError(str(error)) from None


@lru_cache(maxsize=DATABASES)
def _database(number: int) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    for statement in database(number):
        connection.execute(statement)
    connection.set_authorizer(_allowed)
    return connection


def _allowed(action: int, _: str | None, name: str | None, *__: str | None) -> int:
    """What SQLite may do for a query; of a function, `name` is its name."""
    called = action == sqlite3.SQLITE_FUNCTION and name is not None and name.lower() in FUNCTIONS
    return sqlite3.SQLITE_OK if action in READS or called else sqlite3.SQLITE_DENY
