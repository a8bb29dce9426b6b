"""Runs that were made: found below folders, compared by what differs in their recipes, plotted. Imports no torch.

A run that is done is a folder with metrics.jsonl, recipe.yaml and summary.json. One that is under way, was stopped or
was killed has a checkpoints/unfinished.json, which is its recipe, and its metrics.jsonl beside that; whatever else lies
in its folder is of an earlier time.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from graftlm.config.source import parse_yaml
from graftlm.config.trees import flat
from graftlm.display import pages
from graftlm.errors import GraftError, RecipeError, nearest

SEED = "train.seed"

FIGURES: dict[str, Callable[["Run"], Any]] = {
    "steps": lambda run: len(run.steps),
    "train_loss": lambda run: run.last_loss(),
    "base_loss": lambda run: run.value("held_out", "loss_nats", "base"),
    "tuned_loss": lambda run: run.value("held_out", "loss_nats", "tuned"),
    "base_rouge_l": lambda run: run.value("held_out", "rouge_l", "base"),
    "tuned_rouge_l": lambda run: run.value("held_out", "rouge_l", "tuned"),
    "tuned_objective": lambda run: run.value("held_out", "objective", "tuned", "loss"),
    "tuned_accuracy": lambda run: run.value("held_out", "objective", "tuned", "accuracy"),
    "tuned_reward": lambda run: run.value("held_out", "objective", "tuned", "reward"),
    "tokens_per_s": lambda run: run.tokens_per_s(),
    "peak_rss_gib": lambda run: run.value("train", "peak_rss_gib"),
    "wall_s": lambda run: run.value("train", "wall_s"),
}
"""The figures of every run, None where unknown. Losses are in nats per supervised token; `objective` is what
another loss says of held-out answers, and `accuracy` how often it prefers the right one."""


@dataclass(frozen=True)
class Run:
    folder: Path
    status: str
    """finished, or unfinished."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """By dotted keys, defaults included."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    """The lines of metrics.jsonl that are steps."""

    def value(self, *path: str) -> Any:
        """A value of summary.json, or None."""
        found: Any = self.summary
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def last_loss(self) -> float | None:
        """The mean of the last twentieth of the steps, in nats."""
        losses = [step["loss"] for step in self.steps if math.isfinite(step["loss"])]
        return pages.smoothed(losses)[-1] if losses else None

    def tokens_per_s(self) -> float | None:
        seconds = sum(step.get("wall_s", 0.0) for step in self.steps)
        return sum(step.get("tokens", 0) for step in self.steps) / seconds if seconds else None


@dataclass(frozen=True)
class RunTable:
    runs: list[Run]
    damaged: dict[str, str]
    """Folder -> what is wrong with it."""
    differ: list[str]
    """The keys of recipes that do not have the same value in all of them."""

    def rows(self, sort: str | None = None, *, reverse: bool = False) -> list[dict[str, Any]]:
        """A flat row for each run: run, status, what differs, FIGURES; sorted by a column, unknown values last.

        Raises RecipeError for a column that there is not.
        """
        names = short_names(self.differ)
        labels = _labels([run.folder for run in self.runs])
        rows = [
            {"run": label, "status": run.status}
            | {names[key]: run.recipe.get(key) for key in self.differ}
            | {name: figure(run) for name, figure in FIGURES.items()}
            for run, label in zip(self.runs, labels, strict=True)
        ]
        if sort is None:
            return rows
        column = next((short for key, short in names.items() if sort in (key, short)), sort)
        if rows and column not in rows[0]:
            raise RecipeError(
                f"--sort {sort}: there is no such column. {nearest(sort, rows[0])}", code="unknown-column"
            )
        rows_with_value = [row for row in rows if row[column] is not None]
        rows_with_value.sort(key=lambda row: _sort_key(row[column]), reverse=reverse)
        return rows_with_value + [row for row in rows if row[column] is None]

    def over_seeds(self) -> list[dict[str, Any]]:
        """Finished runs that differ in their seed alone, as one row each: how many, mean and standard deviation.

        The spread is that of single runs (n - 1), None for one run. Empty where no two runs differ so.
        """
        alike: dict[str, list[Run]] = {}
        for run in self.runs:
            if run.status == "finished" and run.recipe:
                rest = {key: value for key, value in run.recipe.items() if key != SEED}
                alike.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(run)
        if all(len({run.recipe.get(SEED) for run in group}) < 2 for group in alike.values()):
            return []
        names = short_names([key for key in self.differ if key != SEED])
        rows = []
        for group in alike.values():
            row: dict[str, Any] = {short: group[0].recipe.get(key) for key, short in names.items()}
            row["seeds"] = len(group)
            for name in SPREAD:
                values = [value for run in group if (value := SPREAD[name](run)) is not None]
                row[name] = {
                    "mean": mean(values) if values else None,
                    "sd": stdev(values) if len(values) > 1 else None,
                }
            rows.append(row)
        return rows


def _gain(run: Run) -> float | None:
    base, tuned = (run.value("held_out", "loss_nats", side) for side in ("base", "tuned"))
    return None if base is None or tuned is None else base - tuned


SPREAD: dict[str, Callable[[Run], Any]] = {
    "tuned_loss": FIGURES["tuned_loss"],
    "gain": _gain,
    "tuned_rouge_l": FIGURES["tuned_rouge_l"],
    "tuned_objective": FIGURES["tuned_objective"],
    "tuned_accuracy": FIGURES["tuned_accuracy"],
    "tokens_per_s": FIGURES["tokens_per_s"],
}
"""What is averaged over seeds. `gain` is base less tuned: another seed holds out other rows, and each its own base."""


def compare(folders: Iterable[str | Path]) -> RunTable:
    """The runs in and below some folders, in the order of their names; damaged ones are named, not fatal.

    Raises RecipeError for a folder that is not there.
    """
    runs: list[Run] = []
    damaged: dict[str, str] = {}
    for folder in dict.fromkeys(path for path_or_glob in folders for path in _run_folders(Path(path_or_glob))):
        try:
            runs.append(read_run(folder))
        except (GraftError, OSError, ValueError, KeyError, TypeError) as error:
            damaged[str(folder)] = str(error).strip().splitlines()[0]
    runs.sort(key=lambda run: _sort_key(str(run.folder)))
    recipes = [run.recipe for run in runs if run.recipe]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return RunTable(
        runs=runs,
        damaged=damaged,
        differ=[key for key in keys if any(r.get(key) != recipes[0].get(key) for r in recipes)],
    )


def _run_folders(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise RecipeError(f"{folder}: there is no such folder", code="no-such-folder")
    for path, inside, files in os.walk(folder):
        if METRICS in files or os.path.isfile(os.path.join(path, UNFINISHED)):
            inside.clear()  # what is below belongs to this run
            yield Path(path)
        inside[:] = sorted(name for name in inside if not name.startswith("."))


METRICS, UNFINISHED = "metrics.jsonl", "checkpoints/unfinished.json"


def read_run(folder: Path) -> Run:
    """The run in a folder. Raises RecipeError, OSError or ValueError for files that are damaged, naming them."""
    if (folder / UNFINISHED).exists():
        recipe, metrics = _read_json(folder / UNFINISHED), (folder / UNFINISHED).with_name(METRICS)
        return Run(folder, "unfinished", flat(recipe), steps=_steps(metrics) if metrics.exists() else [])
    for name in ("recipe.yaml", "summary.json"):
        if not (folder / name).exists():
            raise ValueError(f"{folder / name} is missing: a run that is done has one")
    summary = _read_json(folder / "summary.json")
    tree, _ = parse_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"), str(folder / "recipe.yaml"))
    status = "unfinished" if summary.get("interrupted") else "finished"
    return Run(folder, status, flat(tree), summary, _steps(folder / METRICS))


def _steps(file: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(file) if "loss" in line and "event" not in line]


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that was cut off while it was written is not there.

    Raises ValueError for others that are no JSON, naming the line.
    """
    lines = file.read_bytes().split(b"\n")
    for number, text in enumerate(lines[:-1], start=1):
        try:
            line = json.loads(text)
        except ValueError:
            raise ValueError(f"{file}:{number}: not valid JSON") from None
        if not isinstance(line, dict):
            raise ValueError(f"{file}:{number}: not a mapping")
        yield line


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{file}: not valid JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: not a mapping")
    return found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest ends of dotted keys that are unique among them and among the other columns."""
    other_columns = {"run", "status", "seeds", *FIGURES, *SPREAD}
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [other for other in keys if other != key]
        free = (
            end for end in ends if end not in other_columns and not any(f".{o}".endswith(f".{end}") for o in others)
        )
        names[key] = next(free, key)
    return names


def _labels(folders: Sequence[Path]) -> list[str]:
    """Folders without what all of them begin with."""
    if len(folders) < 2:
        return [str(folder) for folder in folders]
    common = os.path.commonpath([folder.absolute() for folder in folders])
    return [os.path.relpath(folder.absolute(), common) for folder in folders]


def _sort_key(value: Any) -> tuple[int, Any]:
    """Numbers by size and before words; numbers within words by size too."""
    if isinstance(value, int | float):
        return 0, value
    parts: list[Any] = [""]
    for character in str(value):
        same = character.isdigit() == parts[-1][-1:].isdigit()
        parts = [*parts[:-1], parts[-1] + character] if same else [*parts, character]
    return 1, [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


# Output ----------------------------------------------------------------------------------------------------------


def to_json(found: RunTable, sort: str | None = None, *, reverse: bool = False) -> dict[str, Any]:
    """{"runs": [a flat row each], "differ": [dotted keys], "over_seeds": [...], "damaged": {folder: why}}"""
    return {
        "runs": found.rows(sort, reverse=reverse),
        "differ": found.differ,
        "over_seeds": found.over_seeds(),
        "damaged": found.damaged,
    }


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The columns of which something is known, and every row of them as text."""
    columns = [name for name in (rows[0] if rows else ()) if any(_text(row[name]) != "-" for row in rows)]
    return columns, [[_text(row[name]) for name in columns] for row in rows]


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and value.keys() == {"mean", "sd"}:
        return _text(value["mean"]) + ("" if value["sd"] is None else f" +- {_text(value['sd'])}")
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def html(found: RunTable, rows: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """The table and the losses of all steps, as a page."""
    tables = [("runs", *cells(rows))]
    if seeds := found.over_seeds():
        tables.append(("over seeds: mean and standard deviation of single runs", *cells(seeds)))
    return pages.page(
        "table.html.jinja",
        title=title,
        notes=[],
        picture=_curves(found.runs),
        tables=tables,
        damaged=found.damaged,
    )


MAX_LEGEND_ENTRIES = 20
"""Curves that the legend names."""


def _curves(runs: Sequence[Run]) -> str:
    from matplotlib import colormaps  # with this many lines colors must differ: those of one map, evenly

    figure, axis = pages.figure(height=4.5)
    for number, (run, name) in enumerate(zip(runs, _labels([run.folder for run in runs]), strict=True)):
        losses = {step["step"]: step["loss"] for step in run.steps if math.isfinite(step["loss"])}
        color = colormaps["turbo"]((number + 0.5) / len(runs))
        label = name if number < MAX_LEGEND_ENTRIES else None
        axis.plot(list(losses), pages.smoothed(list(losses.values())), color=color, linewidth=1.5, label=label)
    axis.set(xlabel="step", ylabel="loss, nats per supervised token (smoothed)")
    if runs:
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return pages.svg(figure)
