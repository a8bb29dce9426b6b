"""Files of tasks: YAML with `tasks`, and the base that they are for; or `builtin:tasks`, each of its tasks by name."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import field_validator

from graftlm.config.schema import Flag, build, config
from graftlm.config.source import read_tree
from graftlm.data.sources.tasks.table import TASKS
from graftlm.errors import DataError, nearest
from graftlm.evaluation.task import BUILTIN, TaskConfig


@config
class TasksConfig:
    """What `graft eval` reads. A wrong value raises a ValueError."""

    tasks: Mapping[str, TaskConfig]
    base: str | None = None
    """The base, as `--base`. Default: that of the first adapter."""
    network: Flag = False
    """Rows may be fetched from the hub."""

    @field_validator("tasks")
    @classmethod
    def _one_at_least(cls, tasks: Mapping[str, TaskConfig]) -> Mapping[str, TaskConfig]:
        if not tasks:
            raise ValueError("no tasks: name one at least")
        return tasks


def is_task_file(path: Path) -> bool:
    """Whether a YAML file has tasks, so that it is no recipe of a training."""
    return "tasks" in read_tree(path)[0]


def read_tasks(source: str) -> TasksConfig:
    """The tasks of a file, or of `builtin:tasks[/NAME]`. Raises RecipeError with file, line and key."""
    if source.partition("/")[0] == BUILTIN:
        return TasksConfig(tasks=tasks_of_builtin(source))
    tree, lines = read_tree(Path(source))
    return build(TasksConfig, tree, source=source, lines=lines)


def tasks_of_builtin(source: str) -> dict[str, TaskConfig]:
    """`builtin:tasks/NAME` as a task, or `builtin:tasks` as one for each of its names."""
    name = source.removeprefix(BUILTIN).removeprefix("/")
    if name and name not in TASKS:
        raise DataError(f"{source}: no such task. {nearest(name, TASKS)}", code="no-such-data-set")
    return {each: TaskConfig(rows=f"{BUILTIN}/{each}") for each in ([name] if name else TASKS)}
