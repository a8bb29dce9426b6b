"""Eight task adapters as one, by rule and space: scores on each task against each adapter's own.

    python benchmarks/merge_table/run.py                        all of them, then result.json; resumes
    python benchmarks/merge_table/run.py --variants mean ties   only these, without a result
    python benchmarks/merge_table/run.py --quick                two tasks, one seed, four rows, without a result

An adapter that is not in $GRAFT_CACHE/task-adapters/ is trained first. Nothing is timed: other work may run beside it.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402
from task_adapters import few, own_scores, packs_of, record, recorded, rows_of, scores_of, trained  # noqa: E402

from graftlm import load_base  # noqa: E402
from graftlm.adapters.adapter import Adapter  # noqa: E402
from graftlm.combine.compose import compose  # noqa: E402
from graftlm.combine.layer_weights import learn_layer_weights  # noqa: E402
from graftlm.combine.rules import COMPOSERS  # noqa: E402
from graftlm.combine.rules.base import RuleConfig  # noqa: E402
from graftlm.evaluation.statistics.intervals import difference_interval, mean_interval  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
OWN = "each alone"


def rule(by: str | dict[str, Any]) -> RuleConfig:
    tree = {"name": by} if isinstance(by, str) else by
    made: RuleConfig = COMPOSERS[tree["name"]].config(**tree)
    return made


class Merges:
    """The adapters of one seed and what becomes of them; base and adapters are read when first needed."""

    def __init__(self, tasks: list[str], seed: int, rows: int) -> None:
        self.tasks, self.seed, self.rows = tasks, seed, rows
        self.held_out = {task: rows_of(task, seed)[1][:rows] for task in tasks}
        self.loaded: tuple[Any, Any, list[Adapter]] | None = None

    def own(self) -> dict[str, Any]:
        return {task: own_scores(task, self.seed, self.rows)._asdict() for task in self.tasks}

    def parts(self) -> tuple[Any, Any, list[Adapter]]:
        if self.loaded is None:
            adapters = [Adapter.read(trained(task, self.seed)) for task in self.tasks]
            model, tokenizer = load_base(CONFIG["base"])
            self.loaded = model, tokenizer, adapters
        return self.loaded

    def merged(self, variant: dict[str, Any], space: str) -> dict[str, Any]:
        """{tasks: task -> {scores, groups}, largest_error: of the cut to the rank}"""
        model, tokenizer, adapters = self.parts()
        by = rule(variant["by"])
        weights: Any = [variant["weight"]] * len(adapters) if "weight" in variant else self.learned(by)
        made = compose(
            model,
            adapters,
            by=by,
            weights=weights,
            space=space,  # type: ignore[arg-type]
            rank=variant.get("rank", CONFIG["rank"]),
            seed=self.seed,
        )
        error = max(site.error for site in made.sites.values())
        return {"tasks": scores_of(model, tokenizer, made.adapter, self.held_out), "largest_error": error}

    def learned(self, by: Any) -> dict[str, tuple[float, ...]]:
        """The weights of `cat`, from rows that the adapters were trained on."""
        model, tokenizer, adapters = self.parts()
        rows = [
            row for task in self.tasks for row in few(rows_of(task, self.seed)[0], CONFIG["cat"]["rows"], self.seed)
        ]
        found = learn_layer_weights(
            model,
            adapters,
            packs_of(model, tokenizer, rows),
            evaluations=CONFIG["cat"]["evaluations"],
            learning_rate=by.learning_rate,
        )
        print(f"cat: loss {found.start:.3f} -> {found.value:.3f}", flush=True)
        return found.weights


def table(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Variant and space -> its mean score with an interval over templates, and that against each adapter's own."""

    def flat(runs: list[dict[str, Any]], what: str) -> list[Any]:
        return [value for run in runs for task in run["tasks"].values() for value in task[what]]

    own = flat(found[OWN], "scores")
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in found.items():
        scores, groups = flat(runs, "scores"), flat(runs, "groups")
        mean, less = mean_interval(scores, groups), difference_interval(scores, own, groups)
        rows[name] = {
            "score": [round(number, 3) for number in (mean.value, mean.low, mean.high)],
            "of_own": round(sum(scores) / max(1.0, sum(own)), 3),
            "less_than_own": [round(number, 3) for number in (less.value, less.low, less.high)],
            "by_task": {
                task: round(sum(sum(run["tasks"][task]["scores"]) for run in runs) / sum(
                    len(run["tasks"][task]["scores"]) for run in runs
                ), 3)
                for task in runs[0]["tasks"]
            },
            "by_seed": [round(sum(flat([run], "scores")) / len(flat([run], "scores")), 3) for run in runs],
            "largest_error": round(max(run.get("largest_error", 0.0) for run in runs), 3),
        }  # fmt: skip
    merges = {name: row for name, row in rows.items() if name != OWN}
    if merges:
        best = max(merges, key=lambda name: merges[name]["score"][0])
        scores, groups = flat(found[best], "scores"), flat(found[best], "groups")
        for name in merges:
            gap = difference_interval(flat(found[name], "scores"), scores, groups)
            rows[name]["not_worse_than_best"] = gap.high >= 0
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--variants", nargs="*", default=list(CONFIG["variants"]), choices=list(CONFIG["variants"]))
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tasks, seeds, rows, runs = CONFIG["tasks"], CONFIG["seeds"], CONFIG["rows"], HERE / "runs"
    if asked.quick:
        tasks, seeds, rows, runs = tasks[:2], seeds[:1], 4, HERE / "quick"
        CONFIG["cat"]["evaluations"] = 3
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        merges = Merges(tasks, seed, rows)
        found.setdefault(OWN, []).append({"tasks": merges.own()})
        for name in asked.variants:
            variant = CONFIG["variants"][name]
            for space in variant["spaces"]:
                file = runs / f"{name}.{space}.{seed}.json"
                if (run := recorded(file)) is None:
                    run = merges.merged(variant, space)
                    record(file, run)
                found.setdefault(f"{name}, {space}", []).append(run)
                scores = [value for task in run["tasks"].values() for value in task["scores"]]
                print(f"{name}, {space}, seed {seed}: {sum(scores):.0f} of {len(scores)}", flush=True)
    made = table(found)
    for name, row in sorted(made.items(), key=lambda each: -each[1]["score"][0]):
        print(name, json.dumps(row))
    if not asked.quick and asked.variants == list(CONFIG["variants"]):
        write_result(__file__, {"config": CONFIG, "table": made})


if __name__ == "__main__":
    main()
