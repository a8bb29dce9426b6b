"""Choosing rows: scores are made once and kept; how many rows stay is decided afterwards, as often as one likes.

rows -> pool -> scores (kept by what they depend on) -> the best `keep` of them, in the order of the file
"""

import datetime
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from graftlm import distributed
from graftlm.config.schema import to_tree
from graftlm.data.batches.pack import Example
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.token_cache import key as tokens_key
from graftlm.data.quality.report import Report
from graftlm.data.sources.convert import to_fields, write_lines
from graftlm.data.sources.source import SELECTED, DataConfig, Row
from graftlm.display import terminal
from graftlm.errors import DataError, RecipeError
from graftlm.files import cache_folder, check_lines, check_new, whole
from graftlm.hub.config import BaseConfig, base_config
from graftlm.hub.load import load_base
from graftlm.hub.locate import locate
from graftlm.passes.packing_check import check_packing
from graftlm.selection import SELECTORS
from graftlm.selection.base import Pool, Scores, SelectorConfig, examples_of
from graftlm.system import preserve_global_state, return_freed_memory
from graftlm.training.positions import check_positions

SCORES_VERSION = 2
"""Raised when a method's scores come to mean something else, so that old ones are not taken for new ones."""


@dataclass(frozen=True)
class SelectorResult:
    """What one selector did."""

    by: str
    rows: int
    """It was given so many."""
    left_out: int
    """Rows that the selector rules out, whatever `keep` is."""
    kept: int
    threshold: float
    """The lowest score that was kept."""
    reused: bool
    """Whether its scores were there already."""
    scores: Path
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        found = "scores that were kept" if self.reused else "new scores"
        return "; ".join(
            [f"{self.by} kept {self.kept} of {self.rows} rows ({self.left_out} left out, {found})", *self.notes]
        )


@preserve_global_state()
def choose(
    selectors: Sequence[SelectorConfig],
    rows: Sequence[Row],
    tokenizer: Any,
    console: Console,
    *,
    base: str | BaseConfig,
    data: DataConfig,
    pack_tokens: int,
    network: bool = False,
    today: datetime.date | None = None,
) -> tuple[list[Row], list[SelectorResult]]:
    """The rows that the selectors keep, each asked about what those before it left; in the order given.

    Raises DataError where nothing is left, and RecipeError for a selector that ranks and is not told how many to keep.
    """
    _check_selectors(selectors)
    renderer, choices = Renderer(tokenizer, turn_order=data.turn_order, today=today), list[SelectorResult]()
    with terminal.progress(console) as bars:

        def progress(what: str, done: int, total: int) -> None:
            if not tasks or bars.tasks[tasks[-1]].description != what:
                tasks.append(bars.add_task(what, now=""))
            bars.update(tasks[-1], completed=done, total=total)

        def fit(examples: Sequence[Example], what: str) -> None:
            check_positions(base, examples, Report(), network=network, what=what)

        tasks: list[Any] = []
        load = cache(lambda: _proved(base, pool))
        pool = Pool(
            rows,
            examples_of(rows, renderer, data),
            renderer,
            data,
            load,
            pack_tokens=pack_tokens,
            network=network,
            check_positions=fit,
            progress=progress,
        )
        place = np.arange(len(pool))
        for config in selectors:
            pool.notes.clear()
            indices, scores, choice = _choose_by(config, pool, _base_stamp(base, network=network))
            choices.append(choice)
            place, pool = place[indices], pool.part(indices)
    load.cache_clear()
    return_freed_memory()
    selected_rows = [rows[i] for i in place.tolist()]
    if data.order is not None and data.order.by == SELECTED:
        selected_rows = [replace(row, score=score) for row, score in zip(selected_rows, scores.tolist(), strict=True)]
    return selected_rows, choices


def _check_selectors(selectors: Sequence[SelectorConfig]) -> None:
    if distributed.count() > 1:
        raise RecipeError(
            "select: rows are chosen by one process. Choose them first, with graft data select", code="one-process-only"
        )
    for config in selectors:
        if config.keep is None and not SELECTORS[config.by].filters:
            raise RecipeError(
                f"select: {config.by} ranks rows: say how many to keep (keep: 100) or which share (keep: 0.1)",
                code="missing-option",
            )


def _choose_by(config: SelectorConfig, pool: Pool, base: str) -> tuple[list[int], Scores, SelectorResult]:
    """The numbers of the rows that one selector keeps, in order, and their scores."""
    file = _scores_folder() / f"{_key(config, pool, base)}.jsonl"
    scores = read_scores(file, len(pool))
    reused = scores is not None
    if scores is None:
        scores = SELECTORS[config.by].score(config, pool)
        assert scores.shape == (len(pool),)
        assert scores.dtype == np.float32
        write_scores(file, config, pool.rows, scores)
    indices = best(scores, config.keep)
    if not indices:
        raise DataError(f"select: {config.by} leaves out all {len(pool)} rows", code="no-rows-left")
    count = count_of(config.keep, len(pool))
    notes = list(pool.notes)
    if len(indices) < count and config.keep is not None:
        notes.append(f"{count} were wanted, and no more than {len(indices)} are not left out")
    left_out = int(np.isneginf(scores).sum())
    lowest = float(scores[indices].min())
    return (
        indices,
        scores[indices],
        SelectorResult(config.by, len(pool), left_out, len(indices), lowest, reused, file, tuple(notes)),
    )


def count_of(keep: float | None, rows: int) -> int:
    """How many rows a number or a share of `rows` is: one at least."""
    if keep is None:
        return rows
    return max(1, round(keep * rows)) if isinstance(keep, float) else keep


def best(scores: Scores, keep: float | None) -> list[int]:
    """The numbers of the rows with the best scores, in order; of equals the first, and none that is left out."""
    order = np.argsort(-scores, kind="stable")
    order = order[~np.isneginf(scores[order])]
    return sorted(order[: count_of(keep, len(scores))].tolist())


def _proved(base: str | BaseConfig, pool: Pool) -> Any:
    """The base, proved on the shortest and the longest of the rows as a run proves it; DataError for rows that are
    longer than its positions."""
    examples = [example for row in pool.examples for example in row]
    pool.check_positions(examples, "rows")
    model: Any = load_base(base, network=pool.network).model
    check_packing(model, examples, packed=pool.data.pack, sharing=False)
    return model


# What scores depend on ---------------------------------------------------------------------------------------------


def _key(config: SelectorConfig, pool: Pool, base: str) -> str:
    """The name of the scores: a hash of all that they depend on, which `keep` is not."""
    settings = {key: value for key, value in to_tree(config).items() if key != "keep"}
    target = getattr(config, "target", None)
    return _hash(
        SCORES_VERSION,
        settings,
        base,
        _of_rows(pool),
        _of_rows(pool.other(target)) if target is not None else None,
    )


def _of_rows(pool: Pool) -> list[Any]:
    """All that their tokens follow from, and what is cut at which length; and their groups, which stay together."""
    tokens = tokens_key(pool.rows, pool.renderer, pool.data)
    return [tokens, pool.data.max_tokens, pool.data.over_length, [row.group for row in pool.rows]]


def _base_stamp(base: str | BaseConfig, *, network: bool) -> str:
    """Which base: its config, and the names, sizes and times of its files, so that no weight needs to be read."""
    base = base_config(base)
    folder = Path(locate(base, network=network))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return _hash(to_tree(base), [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])


def _hash(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


# Files -------------------------------------------------------------------------------------------------------------


def _scores_folder() -> Path:
    return cache_folder() / "scores"


def write_scores(file: Path, config: SelectorConfig, rows: Sequence[Row], scores: Scores) -> None:
    """A line that says what they are, then {where, score} for each row; null for one that is left out."""
    head = {"by": config.by, "key": file.stem, "rows": len(rows), "config": to_tree(config)}
    pairs = zip(rows, scores.tolist(), strict=True)
    lines = ({"where": row.where, "score": None if score == -np.inf else score} for row, score in pairs)
    with whole(file) as draft:
        write_lines(draft, [head, *lines])


def read_scores(file: Path, count: int) -> Scores | None:
    """Scores of so many rows float32 [n]; None where there are none, or they are damaged and to be made again."""
    try:
        head, *lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        if head["key"] != file.stem or len(lines) != count:
            return None
        return np.array([-np.inf if line["score"] is None else line["score"] for line in lines], np.float32)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_rows(out: Path, rows: Sequence[Row], choices: Sequence[SelectorResult]) -> list[Path]:
    """Rows in the messages format, and beside them the scores that chose them; returns the files of scores."""
    with whole(out) as draft:
        write_lines(draft, map(to_fields, rows))
    beside = []
    for number, choice in enumerate(choices, start=1):
        beside.append(out.with_name(f"{out.name}.scores{f'-{number}' * (len(choices) > 1)}.jsonl"))
        with whole(beside[-1]) as draft:
            shutil.copyfile(choice.scores, draft)
    return beside


def check_writable(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError where rows cannot be written, before anything is computed."""
    check_lines(out)
    check_new(out, overwrite=overwrite)
