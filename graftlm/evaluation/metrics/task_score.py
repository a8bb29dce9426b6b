"""The score of `builtin:tasks`: 1 where the answer is the same as the row's own by what its task compares, else 0
(`graftlm/evaluation/tasks.py`): as text, as JSON, or as SQL by the rows that both queries give.

`same` names the comparison; without it the row's group names its task."""

from collections.abc import Sequence
from typing import Literal

from graftlm.config.schema import config
from graftlm.data.sources.formats import Message
from graftlm.data.sources.source import Row
from graftlm.evaluation.metrics.base import Answer, Array, MetricConfig, MetricRow, references, scores
from graftlm.evaluation.tasks import SAME, score


@config
class TaskScoreConfig(MetricConfig):
    name: Literal["task_score"] = "task_score"
    same: Literal["text", "json", "sql"] | None = None


def parts(config: TaskScoreConfig, items: Sequence[Answer]) -> Array:
    return scores([_score(config, item) for item in items])


def _score(config: TaskScoreConfig, item: Answer) -> float:
    wanted = references(item, config.name)
    if config.same is not None:
        return float(any(SAME[config.same](each, item.text) for each in wanted))
    messages = [Message("user", item.prompt), Message("assistant", wanted[0])]
    return score(Row(messages, item.where, str(item.fields.get("group", ""))), item.text)


ROWS = {"task_score": MetricRow(TaskScoreConfig, (Answer,), parts)}
