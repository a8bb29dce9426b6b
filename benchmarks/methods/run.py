"""Every method on one short job: what it learns, what it forgets, what it costs.

    python benchmarks/methods/run.py learn     the sweep, then the seeds, two processes of one thread each; resumes
    python benchmarks/methods/run.py cost      step time and memory against LoRA in alternation; on an idle machine
    python benchmarks/methods/run.py table     result.json, the measured facts in the package, the picture
    python benchmarks/methods/run.py           all of it

Every run is a line of runs.jsonl and every cost a line of costs.jsonl: what is there is not done again. A method that
is given to the command line is done alone.
"""

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import commit, peak_rss_gib, write_result  # noqa: E402

from graftlm.config.schema import build  # noqa: E402
from graftlm.data.batches.pack import Example  # noqa: E402
from graftlm.data.chat.render import Renderer  # noqa: E402
from graftlm.deltas import METHODS  # noqa: E402
from graftlm.evaluation.held_out import answers, can_be_answered, held_out_loss, rouge_l  # noqa: E402
from graftlm.hub.load import load_base  # noqa: E402
from graftlm.model.attach import attach, detach  # noqa: E402
from graftlm.model.registry import parameters_of  # noqa: E402
from graftlm.prepare import Prepared, prepare_data  # noqa: E402
from graftlm.recipe import Recipe  # noqa: E402
from graftlm.system import return_freed_memory, tune_process  # noqa: E402
from graftlm.training.phases import attach_deltas, make_batches  # noqa: E402
from graftlm.training.trainer import Trainer  # noqa: E402

tune_process()  # here, for the worker processes too
CONFIG = yaml.safe_load((HERE / "config.yaml").read_text())
ROOT = HERE.parent.parent
MEASURED = ROOT / "graftlm" / "measured.json"
NOT_KEPT = ("sweep", "held_out_loss_spread")
RUNS, COSTS = HERE / "runs.jsonl", HERE / "costs.jsonl"
BASE = "(base)"
ALWAYS = float("inf")


def recipe(method: str, learning_rate: float | None, seed: int) -> Recipe:
    tree = {key: CONFIG[key] for key in ("base", "data")}
    tree["delta"] = {"method": method} | CONFIG["settings"].get(method, {})
    tree["train"] = CONFIG["train"] | {"learning_rate": learning_rate, "seed": seed}
    return build(Recipe, tree, source=f"benchmarks/methods: {method}")


# One process: the base is loaded once, every delta is taken off again ---------------------------------------------


class Job:
    """The base, the rows and the general text, loaded once a process."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model, self.tokenizer = load_base(CONFIG["base"])
        self.renderer = Renderer(self.tokenizer)
        self.prepared: dict[int, Prepared] = {}
        self.general = _general_text(self.tokenizer)

    def data(self, seed: int) -> Prepared:
        if seed not in self.prepared:
            made = prepare_data(recipe("lora", None, seed), self.tokenizer)
            short = [example for example in made.examples if len(example) <= CONFIG["row_tokens"]]
            self.prepared[seed] = replace(made, examples=short)
        return self.prepared[seed]

    def measure(self, seed: int, *, answers_below: float) -> dict[str, float]:
        """Losses; and answers where the held-out loss is below the best of the sweep so far, for they take long."""
        data, settings = self.data(seed), {"pack_tokens": CONFIG["train"]["pack_tokens"], "packed": True}
        found = {
            "held_out_loss": held_out_loss(self.model, data.held_out[: CONFIG["held_out_rows"]], **settings),
            "general_loss": held_out_loss(self.model, self.general, **settings),
        }
        if found["held_out_loss"] < answers_below:
            rows = [row for row in data.held_out_rows if can_be_answered(row)][: CONFIG["answers"]]
            texts = answers(self.model, self.renderer, rows, CONFIG["max_new_tokens"], lambda done: None)
            scores = [rouge_l(row.messages[-1].content, text) for row, text in zip(rows, texts, strict=True)]
            found["rouge_l"] = statistics.mean(scores)
        return found


def _general_text(tokenizer: Any) -> list[Example]:
    """English prose that is no docstring: topics of Python's own manual, as examples whose every token counts."""
    from pydoc_data.topics import topics

    examples = []
    for name in CONFIG["general"]["topics"]:
        ids = tokenizer(topics[name][: CONFIG["general"]["characters"] // 5], add_special_tokens=False)["input_ids"]
        weights = np.ones(len(ids), np.float32)
        weights[0] = 0  # nothing predicts the first
        examples.append(Example(np.array(ids, np.int32), weights, name))
    return examples


JOB: Job | None = None


def learn(method: str, learning_rate: float | None, seed: int, answers_below: float) -> dict[str, Any]:
    """Train one delta and measure it; a line of runs.jsonl. For the base: measure alone."""
    global JOB  # noqa: PLW0603 (one a process)
    JOB = JOB or Job()
    started = time.perf_counter()
    line: dict[str, Any] = {"key": key(method, learning_rate, seed), "method": method, "seed": seed, "commit": commit()}
    line |= {"learning_rate": learning_rate}
    if method == BASE:
        return line | JOB.measure(seed, answers_below=answers_below)
    data, wanted = JOB.data(seed), recipe(method, learning_rate, seed)
    plan, setup = make_batches(wanted.train, data.examples), wanted.setup()
    try:
        attach_deltas(setup, JOB.model, data.examples, plan)
        line["parameters"] = sum(p.numel() for p in parameters_of(JOB.model, "default"))
        torch.manual_seed(seed)
        trainer = Trainer(setup, JOB.model, data.examples, plan)
        line["losses"] = [round(step.loss, 4) for step in trainer.steps()]
        trainer.end()
        for module in JOB.model.modules():
            module.training = False
        line |= JOB.measure(seed, answers_below=answers_below)
    except Exception as error:  # a method that breaks must not take the grid with it
        line["error"] = f"{type(error).__name__}: {error}"[:500]
    finally:
        detach(JOB.model)
    return line | {"wall_s": round(time.perf_counter() - started, 1)}


# The grid --------------------------------------------------------------------------------------------------------


def key(method: str, learning_rate: float | None, seed: int) -> str:
    """What a run is, as a word: the job, the method's settings, the rate and the seed."""
    job = {k: CONFIG[k] for k in ("base", "data", "train", "row_tokens", "held_out_rows", "general")}
    facts = json.dumps([job, CONFIG["settings"].get(method)], sort_keys=True)
    rate = "-" if learning_rate is None else f"{learning_rate:.3g}"
    return f"{method} {rate} {seed} {hashlib.sha256(facts.encode()).hexdigest()[:8]}"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def done() -> dict[str, dict[str, Any]]:
    """What has been run by key; a run with answers counts before the same without."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines(RUNS):
        if line["key"] not in found or "rouge_l" in line or "error" not in line:
            found[line["key"]] = line
    return found


def swept(method: str, have: dict[str, dict[str, Any]]) -> dict[float, float]:
    """Learning rate -> held-out loss of this method's sweep."""
    start = key(method, None, CONFIG["sweep"]["seed"]).split()
    found = {}
    for line in have.values():
        words = line["key"].split()
        if (words[0], words[2], words[3]) == (start[0], start[2], start[3]) and words[1] != "-":
            loss = line.get("held_out_loss", float("inf"))
            found[line["learning_rate"]] = loss if loss == loss else float("inf")
    return found


def chosen_rate(method: str, have: dict[str, dict[str, Any]]) -> float:
    """The smallest rate that gains nearly what the best does: what is best in a few steps is too much for many; or the
    one that `rates` names."""
    if (named := CONFIG["rates"].get(method)) is not None:
        return float(named)
    found = swept(method, have)
    base: float = have[key(BASE, None, CONFIG["sweep"]["seed"])]["held_out_loss"]
    most = max(base - loss for loss in found.values())
    enough = [rate for rate, loss in found.items() if base - loss >= CONFIG["sweep"]["nearly"] * most]
    return min(enough) if most > 0 else min(found, key=lambda rate: found[rate])


def to_do(methods: Iterable[str], have: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float | None, int, float]]:
    """The next runs: the sweep of each method, one rate after the other; then the seeds at the best."""
    for seed in CONFIG["seeds"]:
        if key(BASE, None, seed) not in have:
            yield BASE, None, seed, ALWAYS
    for method in methods:
        found = swept(method, have)
        rate = next_rate(method, found)
        if rate is not None:
            yield method, rate, CONFIG["sweep"]["seed"], min(found.values(), default=ALWAYS)
            continue
        for seed in CONFIG["seeds"]:
            best = chosen_rate(method, have)
            if "rouge_l" not in have.get(key(method, best, seed), {}):
                yield method, best, seed, ALWAYS


def next_rate(method: str, found: dict[float, float]) -> float | None:
    """Uphill in steps of a factor, from the method's default, until the best rate has a worse one on either side."""
    step, default = CONFIG["sweep"]["step"], METHODS[method].delta.learning_rate
    if not found:
        return default
    best = min(found, key=lambda rate: found[rate])
    if len(found) >= CONFIG["sweep"]["most"] or (min(found) < best < max(found)):
        return None
    return float(f"{best * step if best == max(found) else best / step:.3g}")


def grid(methods: list[str], workers: int = int(os.environ.get("WORKERS", "2"))) -> None:
    have = done()
    running: dict[Any, str] = {}
    failed: set[str] = set()
    with ProcessPoolExecutor(workers) as pool:
        while True:
            tasks = [t for t in to_do(methods, have) if key(*t[:3]) not in {*running.values(), *failed}]
            tasks.sort(key=lambda task: task[2])  # every sweep before the second seed, that before the third
            for task in tasks[: workers - len(running)]:
                running[pool.submit(learn, *task)] = key(*task[:3])
            if not running:
                return
            future = next(as_completed(running))
            line = future.result()
            del running[future]
            have[line["key"]] = line
            if "error" in line:
                failed.add(line["key"])
            with open(RUNS, "a") as file:
                file.write(json.dumps(line) + "\n")
            shown = {k: line.get(k) for k in ("held_out_loss", "general_loss", "rouge_l", "wall_s", "error")}
            print(f"{line['key']}: {shown}, {len(tasks)} to go at least", flush=True)


# What a step costs -----------------------------------------------------------------------------------------------


def cost(methods: list[str]) -> None:
    """Step time and peak memory of each method, in alternation with LoRA in one process."""
    known = {line["method"] for line in lines(COSTS)}
    job = Job()
    for method in methods:
        if method in known:
            continue
        seconds: dict[str, list[float]] = {"lora": [], method: []}
        peaks: dict[str, float] = {}
        for _ in range(CONFIG["cost"]["more_rounds"].get(method, CONFIG["cost"]["rounds"])):
            for name in ("lora", method):
                times, peak = _steps_of(job, name)
                seconds[name] += times
                peaks[name] = max(peak, peaks.get(name, 0.0))
        each = {name: statistics.median(times) for name, times in seconds.items()}
        line = {
            "method": method,
            "step_s": round(each[method], 4),
            "lora_step_s": round(each["lora"], 4),
            "ratio": round(each[method] / each["lora"], 3),
            "peak_gib": round(peaks[method], 3),
            "lora_peak_gib": round(peaks["lora"], 3),
            "commit": commit(),
        }
        with open(COSTS, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def _steps_of(job: Job, method: str) -> tuple[list[float], float]:
    """Seconds of some steps after a first that warms up, on the same rows for every method; and the peak in GiB."""
    wanted = recipe(method, METHODS[method].delta.learning_rate, 0)
    data = job.data(0)
    plan = make_batches(wanted.train, data.examples)[: CONFIG["cost"]["steps"] + 1]
    attach(job.model, wanted.all_deltas()["default"], start=not METHODS[method].delta.needs)
    return_freed_memory()  # of the method before
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    times = [step.wall_s for step in Trainer(wanted.setup(), job.model, data.examples, plan).steps()][1:]
    peak = peak_rss_gib()
    detach(job.model)
    job.model.eval()
    return times, peak


# The table -------------------------------------------------------------------------------------------------------


def table(methods: Iterable[str]) -> dict[str, Any]:
    """What docs/methods.md and `graft methods` show: means over the seeds that all methods have, and costs."""
    have, costs = done(), {line["method"]: line for line in lines(COSTS)}
    rates = {method: chosen_rate(method, have) for method in methods if swept(method, have)}
    runs = {
        method: {seed: line for seed in CONFIG["seeds"] if "rouge_l" in (line := have.get(key(method, rate, seed), {}))}
        for method, rate in rates.items()
    }
    runs = {method: of_seeds for method, of_seeds in runs.items() if CONFIG["sweep"]["seed"] in of_seeds}
    seeds = [seed for seed in CONFIG["seeds"] if all(seed in of_seeds for of_seeds in runs.values())]
    base = _mean([have[key(BASE, None, seed)] for seed in seeds])
    rows: dict[str, Any] = {}
    for method, of_seeds in runs.items():
        mean = _mean([of_seeds[seed] for seed in seeds])
        losses = [of_seeds[seed]["held_out_loss"] for seed in seeds]
        rows[method] = {
            "learning_rate": rates[method],
            "sweep": {f"{r:.3g}": round(v, 4) for r, v in sorted(swept(method, have).items())},
            "seeds": seeds,
            "parameters": of_seeds[seeds[0]]["parameters"],
            "held_out_loss_spread": round(max(losses) - min(losses), 4),
            **{k: round(v, 4) for k, v in mean.items()},
        }
        if (spent := costs.get(method)) is not None:
            rows[method]["ratio"] = spent["ratio"]
            if "peak_gib" in spent:  # against LoRA's beside it: what the process kept of earlier methods is in both
                rows[method]["peak_over_lora_gib"] = round(spent["peak_gib"] - spent["lora_peak_gib"], 3)
    for row in rows.values():
        gained = base["held_out_loss"] - rows["lora"]["held_out_loss"]
        row["share_of_lora"] = round((base["held_out_loss"] - row["held_out_loss"]) / gained, 3)
    return {"config": CONFIG, "base": {k: round(v, 4) for k, v in base.items()}, "methods": rows}


def _mean(found: list[dict[str, Any]]) -> dict[str, float]:
    return {
        k: statistics.mean(values)
        for k in ("held_out_loss", "general_loss", "rouge_l")
        if (values := [line[k] for line in found if k in line])
    }


def main() -> None:
    words = sys.argv[1:]
    parts = [w for w in words if w in ("learn", "cost", "table")] or ["learn", "cost"]
    methods = [w for w in words if w not in ("learn", "cost", "table")] or list(METHODS)
    if "learn" in parts:
        grid(methods)
    if "cost" in parts:
        cost(methods)
    result = table(METHODS)
    write_result(__file__, result)
    rows = {name: {k: v for k, v in row.items() if k not in NOT_KEPT} for name, row in result["methods"].items()}
    MEASURED.write_text(json.dumps({"base": result["base"], "methods": rows}, indent=1) + "\n")
    draw(result, ROOT / "docs" / "methods.svg")


def draw(result: dict[str, Any], file: Path) -> None:
    """What was learnt against what was forgotten, a disc a method, its area the parameters."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "graftlm", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = pyplot.subplots(figsize=(11, 7))
    for name, row in result["methods"].items():
        gain = result["base"]["held_out_loss"] - row["held_out_loss"]
        forgotten = row["general_loss"] - result["base"]["general_loss"]
        axes.scatter(
            forgotten, gain, s=8 + row["parameters"] ** 0.5 / 4, alpha=0.4, color="C0" if name != "lora" else "C3"
        )
        axes.annotate(name, (forgotten, gain), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set_xscale("symlog", linthresh=0.02)
    axes.set_xlabel("forgotten: rise of the loss on general text, nats a token")
    axes.set_ylabel("learnt: fall of the held-out loss, nats a token")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
