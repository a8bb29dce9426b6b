"""Choosing rows against drawing them.

    python benchmarks/selection/run.py planted    LESS: rows of one task among those of others
    python benchmarks/selection/run.py own        k-center: the covering radius; IFD: rows with answers of other rows
    python benchmarks/selection/run.py demo       10 % of docstrings chosen by each method, and drawn
    python benchmarks/selection/run.py table      result.json from what has been run
    python benchmarks/selection/run.py            all of it

Every run is a line of runs.jsonl, and scores are kept where `graft data select` keeps them: what is there is not done
again.
"""

import hashlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import yaml
from rich.console import Console

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import commit, write_result  # noqa: E402

from graftlm.config.schema import build  # noqa: E402
from graftlm.data.chat.render import Renderer  # noqa: E402
from graftlm.data.sources.load import load_rows  # noqa: E402
from graftlm.data.sources.source import Row  # noqa: E402
from graftlm.evaluation.held_out import held_out_loss  # noqa: E402
from graftlm.hub.load import load_base  # noqa: E402
from graftlm.model.attach import detach  # noqa: E402
from graftlm.prepare import select_rows  # noqa: E402
from graftlm.recipe import Recipe  # noqa: E402
from graftlm.selection import ifd  # noqa: E402
from graftlm.selection.base import Pool, embeddings, examples_of  # noqa: E402
from graftlm.selection.k_center import greedy_order  # noqa: E402
from graftlm.system import tune_process  # noqa: E402
from graftlm.training.phases import attach_deltas, make_batches  # noqa: E402
from graftlm.training.trainer import Trainer  # noqa: E402

CONFIG = yaml.safe_load((HERE / "config.yaml").read_text())
RUNS = HERE / "runs.jsonl"
SCRATCH = HERE / "runs"


# Rows ------------------------------------------------------------------------------------------------------------


def reversed_digits(draw: random.Random) -> tuple[str, str]:
    number = str(draw.randint(10000, 9999999))
    return f"Write the digits of {number} in reverse order.", number[::-1]


def addition(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(100, 9999), draw.randint(100, 9999)
    return f"What is {a} + {b}?", str(a + b)


def sorting(draw: random.Random) -> tuple[str, str]:
    numbers = [draw.randint(1, 99) for _ in range(draw.randint(4, 7))]
    return f"Sort these numbers: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))


def capitals(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(WORDS, draw.randint(3, 6))
    return f"Write in capital letters: {' '.join(words)}", " ".join(words).upper()


def dates(draw: random.Random) -> tuple[str, str]:
    year, month, day = draw.randint(1950, 2030), draw.randint(1, 12), draw.randint(1, 28)
    return f"Write the date {day}.{month}.{year} as year-month-day.", f"{year}-{month:02}-{day:02}"


WORDS = (
    "river",
    "stone",
    "window",
    "garden",
    "paper",
    "yellow",
    "market",
    "winter",
    "bridge",
    "candle",
    "forest",
    "silver",
    "morning",
    "table",
    "ocean",
)
OTHERS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (addition, sorting, capitals, dates)


def made(task: Callable[[random.Random], tuple[str, str]], count: int, draw: random.Random) -> list[dict[str, str]]:
    """So many rows of a task, all different."""
    found: dict[str, str] = {}
    while len(found) < count:
        question, answer = task(draw)
        found[question] = answer
    return [{"prompt": q, "completion": a, "group": task.__name__} for q, a in found.items()]


def docstrings(count: int | None, row_tokens: int, renderer: Renderer) -> list[dict[str, str]]:
    """So many short rows of builtin:docstrings, or all of them, in an order drawn once and for all."""
    rows = load_rows("builtin:docstrings")[0]
    random.Random(0).shuffle(rows)
    found: list[dict[str, str]] = []
    for row in rows:
        if len(found) != count and len(renderer.conversation(row.messages).ids) <= row_tokens:
            found.append({"prompt": row.messages[0].content, "completion": row.messages[1].content, "group": row.group})
    return found


def written(name: str, rows: Sequence[dict[str, str]]) -> str:
    SCRATCH.mkdir(exist_ok=True)
    (SCRATCH / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(SCRATCH / name)


class Bench:
    """The base, loaded once."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model, self.tokenizer = load_base(CONFIG["base"])
        self.renderer = Renderer(self.tokenizer)

    def recipe(self, file: str, select: Sequence[dict[str, Any]] = (), **tree: Any) -> Recipe:
        whole = {"base": CONFIG["base"], "data": {"train": file}, "select": list(select), **tree}
        return build(Recipe, whole, source="benchmarks/selection")

    def pool(self, rows: list[Row], recipe: Recipe) -> Pool:
        examples = examples_of(rows, self.renderer, recipe.data)
        return Pool(rows, examples, self.renderer, recipe.data, lambda: self.model, pack_tokens=640)


# Runs that are kept ----------------------------------------------------------------------------------------------


def done() -> dict[str, dict[str, Any]]:
    lines = RUNS.read_text().splitlines() if RUNS.is_file() else []
    return {line["key"]: line for line in map(json.loads, lines)}


def cached(part: str, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a run found, from runs.jsonl or by running it now."""
    facts: list[Any] = [
        CONFIG["base"],
        {k: v for k, v in CONFIG[part].items() if k not in ("seed", "seeds", "methods")},
    ]
    method = CONFIG[part].get("methods", {}).get(name.rpartition(" ")[0])
    facts += [] if method is None else [method]
    key = f"{part} {name} {hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]}"
    if (line := done().get(key)) is None:
        started = time.perf_counter()
        line = {"key": key, "commit": commit(), **run(), "wall_s": round(time.perf_counter() - started, 1)}
        with open(RUNS, "a") as file:
            file.write(json.dumps(line) + "\n")
        print({k: v for k, v in line.items() if k != "places"}, flush=True)
    return line


# LESS on a planted mixture ---------------------------------------------------------------------------------------


def planted(bench: Bench | None) -> dict[str, Any]:
    settings = CONFIG["planted"]

    def run(seed: int) -> dict[str, Any]:
        assert bench is not None
        draw = random.Random(seed)
        rows = docstrings(settings["docstrings"], settings["row_tokens"], bench.renderer)
        rows += [row for task in OTHERS for row in made(task, settings["others"], draw)]
        relevant = made(reversed_digits, settings["relevant"] + settings["target"], draw)
        rows += relevant[: settings["relevant"]]
        draw.shuffle(rows)
        file, target = written("planted.jsonl", rows), written("target.jsonl", relevant[settings["relevant"] :])
        less = {"by": "less", "target": target, "keep": settings["relevant"], "seed": seed, **settings["less"]}
        recipe = bench.recipe(file, [less], train={"pack_tokens": 640})
        chosen, _ = select_rows(recipe, load_rows(file)[0], bench.tokenizer, Console())
        groups = [row.group for row in chosen]
        tasks = {group if group.isidentifier() else "docstrings" for group in groups}
        counts = {t: sum(g == t or (t == "docstrings" and not g.isidentifier()) for g in groups) for t in sorted(tasks)}
        return {"recall": groups.count("reversed_digits") / settings["relevant"], "chosen": counts, "pool": len(rows)}

    runs = [cached("planted", f"less {seed}", lambda seed=seed: run(seed)) for seed in settings["seeds"]]  # type: ignore[misc]
    return {
        "pool": runs[0]["pool"],
        "by_chance": settings["relevant"] / runs[0]["pool"],
        "recall_at_5_percent": [run["recall"] for run in runs],
        "chosen": [run["chosen"] for run in runs],
        "wall_s": [run["wall_s"] for run in runs],
    }


# k-center and IFD on their own criteria ----------------------------------------------------------------------------


def own(bench: Bench | None) -> dict[str, Any]:
    settings = CONFIG["own"]

    def cover() -> dict[str, Any]:
        assert bench is not None
        file = written("own.jsonl", docstrings(settings["rows"], settings["row_tokens"], bench.renderer))
        points = embeddings(bench.pool(load_rows(file)[0], bench.recipe(file)))

        def radius(taken: Any) -> float:
            return float(np.sqrt(np.square(points[:, None] - points[taken]).sum(-1).min(1).max()))

        drawn = [
            radius(np.random.default_rng(s).choice(len(points), settings["k_center_keep"], replace=False))
            for s in range(settings["draws"])
        ]
        taken = greedy_order(points)[: settings["k_center_keep"]]
        return {"radius": radius(taken), "radius_drawn": statistics.mean(drawn), "radius_drawn_least": min(drawn)}

    def tell_apart() -> dict[str, Any]:
        """Answers of some rows go round among them: does IFD see that they do not belong to their questions?"""
        assert bench is not None
        rows = docstrings(settings["rows"], settings["row_tokens"], bench.renderer)
        swapped = list(range(settings["swapped"]))
        answers = [rows[i]["completion"] for i in swapped]
        for i in swapped:
            rows[i] = rows[i] | {"completion": answers[i - 1]}
        file = written("swapped.jsonl", rows)
        pool = bench.pool(load_rows(file)[0], bench.recipe(file))
        found = ifd.ratios(pool, pool.rows, "perplexity")
        wrong, right = found[swapped], np.delete(found, swapped)
        return {
            "ifd_median": float(np.median(right)),
            "ifd_median_of_swapped": float(np.median(wrong)),
            "left_out": float((right >= 1).mean()),
            "left_out_of_swapped": float((wrong >= 1).mean()),
            "auc": float((wrong[:, None] > right[None]).mean()),
        }

    return {"k_center": cached("own", "k-center", cover), "ifd": cached("own", "ifd", tell_apart)}


# The demo job ----------------------------------------------------------------------------------------------------


def demo(bench: Bench | None) -> dict[str, Any]:
    settings = CONFIG["demo"]
    parts: dict[str, list[Row]] = {}

    def rows_of(name: str) -> list[Row]:
        """pool, development or held_out: disjoint, and no module of the pool in what is measured on. The modules of
        the other two are the same: few rows of each task that is measured on are what LESS wants as target."""
        if not parts:
            assert bench is not None
            names = ("development", "held_out")
            rows = docstrings(None, settings["row_tokens"], bench.renderer)
            modules = sorted({row["group"] for row in rows})
            random.Random(1).shuffle(modules)
            taken, sizes = 0, [settings[n] for n in names]
            found: list[dict[str, str]] = []
            while len(found) < sum(sizes):
                found += [row for row in rows if row["group"] == modules[taken]]
                taken += 1
            random.Random(2).shuffle(found)  # so the target has rows of every module that is measured on
            for n, some in zip(names, (found[: sizes[0]], found[sizes[0] : sum(sizes)]), strict=True):
                parts[n] = load_rows(written(f"{n}.jsonl", some))[0]
            rest = [row for row in rows if row["group"] in modules[taken:]]
            assert len(rest) >= settings["pool"], f"only {len(rest)} rows are left for the pool"
            parts["pool"] = load_rows(written("pool.jsonl", rest[: settings["pool"]]))[0]
        return parts[name]

    def chosen(method: str, seed: int) -> list[Row]:
        assert bench is not None
        pool = rows_of("pool")
        if method == "drawn":
            return random.Random(seed).sample(pool, settings["keep"])
        selector = {**settings["methods"][method], "keep": settings["keep"]}
        if selector["by"] in ("less", "rds"):  # rows that are not in the comparison with chance
            selector["target"] = str(SCRATCH / "development.jsonl")
        recipe = bench.recipe(str(SCRATCH / "pool.jsonl"), [selector], train={"pack_tokens": 640})
        return select_rows(recipe, pool, bench.tokenizer, Console())[0]

    def run(method: str, seed: int) -> dict[str, Any]:
        """Train on what a method chooses, in several orders, and measure."""
        if method == "base":
            return measured()
        rows = chosen(method, seed)
        found = [trained(rows, settings["orders"] * seed + order) for order in range(settings["orders"])]
        means = {name: statistics.mean(line[name] for line in found) for name in ("development", "held_out")}
        return {**means, "orders": [line["held_out"] for line in found], "tokens": found[0]["tokens"]}

    def trained(rows: list[Row], seed: int) -> dict[str, Any]:
        assert bench is not None
        recipe = bench.recipe(str(SCRATCH / "pool.jsonl"), train={**settings["train"], "seed": seed})
        examples = [example for row in examples_of(rows, bench.renderer, recipe.data) for example in row]
        plan = make_batches(recipe.train, examples)
        torch.manual_seed(seed)
        setup = recipe.setup()
        attach_deltas(setup, bench.model, examples, plan)
        try:
            trainer = Trainer(setup, bench.model, examples, plan)
            for _ in trainer.steps():
                pass
            trainer.end()
            bench.model.eval()
            return {"tokens": int(sum(e.weights.sum() for e in examples)), **measured()}
        finally:
            detach(bench.model)

    def measured() -> dict[str, Any]:
        assert bench is not None
        recipe = bench.recipe(str(SCRATCH / "pool.jsonl"))
        line = {}
        for name in ("development", "held_out"):
            flat = [e for row in examples_of(rows_of(name), bench.renderer, recipe.data) for e in row]
            line[name] = held_out_loss(bench.model, flat, pack_tokens=640, packed=True)
        return line

    def runs(method: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        return [cached("demo", f"{method} {seed}", lambda s=seed: run(method, s)) for seed in seeds]  # type: ignore[misc]

    def losses(on: str) -> dict[str, list[float]]:
        return {method: [line[on] for line in lines] for method, lines in found.items()}

    def means(of: dict[str, list[float]]) -> dict[str, float]:
        return {method: statistics.mean(each) for method, each in of.items()}

    (base,) = runs("base", [0])  # nothing is drawn
    found = {method: runs(method, settings["seeds"]) for method in ("drawn", *settings["methods"])}
    development, held_out = losses("development"), losses("held_out")
    best = min(settings["methods"], key=means(development).__getitem__)
    return {
        "base": {name: base[name] for name in ("development", "held_out")},
        "trained_tokens": {
            method: statistics.mean(line["tokens"] for line in lines) for method, lines in found.items()
        },
        "development_loss": development,
        "development_loss_mean": means(development),
        "held_out_loss": held_out,
        "held_out_loss_mean": means(held_out),
        "best": best,
        "wins": sum(a < b for a, b in zip(held_out[best], held_out["drawn"], strict=True)),
    }


PARTS = {"planted": planted, "own": own, "demo": demo}


def main() -> None:
    tune_process()
    asked = [word for word in sys.argv[1:] if word != "table"] or ([] if "table" in sys.argv else list(PARTS))
    bench = Bench() if asked else None
    for name in asked:
        print(json.dumps(PARTS[name](bench), indent=1), flush=True)
    result: dict[str, Any] = {"config": CONFIG}
    for name, part in PARTS.items():
        try:
            result[name] = part(None)
        except AssertionError:  # not all of its runs are there
            result[name] = None
    write_result(__file__, result)


if __name__ == "__main__":
    main()
