"""Tasks, a base and its adapters -> scores: all models in one pass over one base.

    found = evaluate(model, tokenizer, tasks, adapters=["a", "b"])
    found.to_json()["tasks"]["capitals"]["a"]["exact_match"]        # {value, low, high, n}

Items are asked in chunks of CHUNK rows, with every model and every template of a chunk in one queue. What is found of a
row does not depend on other chunks: neither the order of tasks nor an interruption changes a bit. Another chunk size
changes the last bits of sums, as every other batch does; rows whose answers these may decide are named (`near_ties`).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graftlm.config.schema import to_tree
from graftlm.errors import TargetError
from graftlm.evaluation.asking import Question, answers, asked_models, questions, tie_of
from graftlm.evaluation.journal import Entry, Journal
from graftlm.evaluation.results import Evaluation
from graftlm.evaluation.task import Task
from graftlm.hub.fingerprint import fingerprint
from graftlm.model.modes import weighted_row
from graftlm.model.registry import attachment, deltas_by_site
from graftlm.model.routes import Row

BASE = "base"
CHUNK = 16
"""Rows that are asked together."""


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    adapters: Sequence[str] | Mapping[str, Sequence[str] | Row] = (),
    base: bool = True,
    journal: Path | None = None,
    replace_journal: bool = False,
    chunk: int = CHUNK,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> Evaluation:
    """Ask every model every item, and measure the answers.

    `adapters` are names of adapters on the model, or a name for each row of them: {"both": {"a": 0.5, "b": 0.5}}.
    `base` measures the model without any. `journal`: a file that a run which was interrupted goes on from; that
    of another evaluation is refused, or begun anew with `replace_journal`.
    `progress` is told the task, and how many of its rows are done, of how many. Raises TargetError for an adapter that
    is not there, DataError for rows that lack what a metric reads, and OutputError for a journal of something else.
    """
    rows = _rows(model, adapters, base)
    models = asked_models(model, tokenizer, rows)
    digest = digest_of(model, tokenizer, tasks, rows, chunk)
    kept = Journal(journal, digest, replace=replace_journal)
    for task in tasks:
        for begin in range(0, len(task.items), chunk):
            numbers = range(begin, min(begin + chunk, len(task.items)))
            if any((task.name, number) not in kept.entries for number in numbers):
                asked = list(questions(task, models, numbers))
                kept.write(_entries(task.name, asked, answers(model, asked)))
            progress(task.name, numbers.stop, len(task.items))
    return Evaluation(tasks, list(rows), kept.entries, BASE if base else None, tie_of(model))


def _rows(model: Any, adapters: Sequence[str] | Mapping[str, Sequence[str] | Row], base: bool) -> dict[str, Row]:
    named = adapters if isinstance(adapters, Mapping) else {name: [name] for name in adapters}
    found: dict[str, Row] = {BASE: {}} if base else {}
    for name, row in named.items():
        if name in found:
            raise TargetError(f"two models are called {name!r}: name an adapter otherwise", code="repeated-model-name")
        # asked for by adapter, not by part: the renderer is that of the adapter
        found[name] = dict(row) if isinstance(row, Mapping) else dict.fromkeys(row, 1.0)
        weighted_row(model, found[name])
    if not found:
        raise TargetError("no model to evaluate: give adapters, or leave the base in", code="no-model-named")
    return found


def _entries(task: str, asked: Sequence[Question], found: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Entry]:
    made: dict[tuple[str, int], dict[str, list[Mapping[str, Any]]]] = {}
    for question, outcome in zip(asked, found, strict=True):
        made.setdefault((task, question.item), {}).setdefault(question.model, []).append(outcome)
    return dict(made)


def digest_of(model: Any, tokenizer: Any, tasks: Sequence[Task], rows: Mapping[str, Row], chunk: int) -> str:
    """Of all that answers depend on: tasks with their rows, the base, its adapters and their templates, and torch.

    Metrics are left out: answers can be measured again by others.
    """
    record = attachment(model)
    tensors = {
        f"{name}.{site}.{key}": _sha256(tensor)
        for name, site, delta in deltas_by_site(model)
        for key, tensor in delta.state_dict().items()
    }
    configs = [to_tree(task.config) | {"metrics": task.needs_unconditional} for task in tasks]
    about = [
        [[task.name, tree, [repr(item) for item in task.items]] for task, tree in zip(tasks, configs, strict=True)],
        {name: dict(row) for name, row in rows.items()},
        [fingerprint(model).digest, str(model.dtype), tensors],
        [{name: to_tree(config) for name, config in record.configs.items()}],
        {name: repr(chat) for name, chat in record.chats.items()},
        [len(tokenizer), str(tokenizer.chat_template), chunk, torch.__version__, str(model.device)],
    ]
    return "sha256:" + hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _sha256(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(torch.uint8) if tensor.dim() else tensor.detach().cpu().reshape(1)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()
