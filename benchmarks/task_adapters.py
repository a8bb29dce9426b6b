"""Adapters of the tasks of `builtin:tasks`: trained once, kept in $GRAFT_CACHE/task-adapters/, and scored.

`task_library/config.yaml` says how they are trained. Seed 0 is NAME, others are NAME-seed-S: the seed is that of the
held-out templates, the start and the order.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.load import attach_adapter
from graftlm.data.batches.pack import Pack, lay_out
from graftlm.data.quality.preflight import prepare
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.source import DataConfig, Row
from graftlm.data.sources.splits import split
from graftlm.evaluation.held_out import answers
from graftlm.evaluation.tasks import score
from graftlm.files import cache_folder
from graftlm.generation.answer import chat_renderer
from graftlm.model.attach import detach

TRAINING: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "task_library" / "config.yaml").read_text())
ADAPTERS = cache_folder() / "task-adapters"
NAME = "measured"


class Scores(NamedTuple):
    """Of some rows of a task, in one order."""

    scores: list[float]
    """1 where a row is answered exactly."""
    groups: list[str]
    """Its template."""


def source(task: str) -> str:
    return f"builtin:tasks/{task}"


def folder_of(task: str, seed: int = 0) -> Path:
    return ADAPTERS / (task if seed == 0 else f"{task}-seed-{seed}")


def trained(task: str, seed: int = 0) -> Path:
    """The adapter of a task, trained now (or what is left of its training) where it is not there."""
    out = folder_of(task, seed)
    if (out / "summary.json").is_file():
        return out
    print(f"training {out.name} ...", flush=True)
    changes = {"data": TRAINING["data"] | {"train": source(task)}, "train": TRAINING["train"] | {"seed": seed}}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(yaml.safe_dump(TRAINING | changes))
        graft = [sys.executable, "-m", "graftlm", "train", str(recipe), "--out", str(out), "--resume"]
        done = subprocess.run(graft, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{out.name}: {(done.stderr or done.stdout)[-2000:]}")
    return out


def rows_of(task: str, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(the rows that the adapter of this seed is trained on, the rows that it never sees, templates in turns)"""
    return split(load_rows(source(task))[0], TRAINING["data"]["held_out"], seed)


def own_scores(task: str, seed: int, rows: int) -> Scores:
    """Of the adapter on its own task, from its training's answers."""
    held_out = rows_of(task, seed)[1]
    said = [json.loads(line) for line in (trained(task, seed) / "held_out.jsonl").read_text().splitlines()]
    if [row.where for row in held_out] != [each["where"] for each in said]:
        sys.exit(f"{folder_of(task, seed)}: its held-out rows are not those of today; remove it to train it again")
    found = zip(held_out[:rows], said[:rows], strict=True)
    return Scores([score(row, each["tuned"]) for row, each in found], [row.group for row in held_out[:rows]])


def scores_of(model: Any, tokenizer: Any, adapter: Adapter | None, rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Task -> {scores, groups} of an adapter (None: of the base) on these rows, by greedy answers of the engine."""
    if adapter is not None:
        attach_adapter(model, adapter, name=NAME)
    try:
        renderer, most = chat_renderer(model, tokenizer), TRAINING["report"]["max_new_tokens"]
        found = {task: answers(model, renderer, own, most, lambda done: None) for task, own in rows.items()}
    finally:
        if adapter is not None:
            detach(model, NAME)
    return {
        task: Scores(
            [score(row, text) for row, text in zip(own, found[task], strict=True)], [row.group for row in own]
        )._asdict()
        for task, own in rows.items()
    }


def packs_of(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[Pack]:
    """Rows as `few_shot_loss` takes them, one to a pack."""
    data = DataConfig(train="rows", max_tokens=TRAINING["data"]["max_tokens"], over_length="error")
    examples, _ = prepare(list(rows), chat_renderer(model, tokenizer), data)
    return lay_out(examples, data.max_tokens, packed=False)


def few(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """So many rows of different templates, the seed-th choice of them."""
    first: dict[str, list[Row]] = {}
    for row in rows:
        first.setdefault(row.group, []).append(row)
    groups = sorted(first)
    chosen = [first[groups[(seed * count + n) % len(groups)]] for n in range(count)]
    return [own[seed % len(own)] for own in chosen]


def recorded(file: Path) -> Any:
    """What a run wrote, or None."""
    return json.loads(file.read_text()) if file.is_file() else None


def record(file: Path, found: Any) -> None:
    """Whole or not at all, so that a run that was stopped is not taken for one that is done."""
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found) + "\n")
    partial.replace(file)
