"""DPO on preference pairs with a right answer, built from real data: what it does to held-out pairs, seed by seed.

A seed's run folder is kept in runs/ and not run again; delete it to start over.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import pairs  # noqa: E402
from machine import write_result  # noqa: E402

import graftlm  # noqa: E402
from graftlm.config.schema import build  # noqa: E402
from graftlm.recipe import Recipe  # noqa: E402
from graftlm.system import tune_process  # noqa: E402


def one_seed(config: dict[str, Any], seed: int) -> dict[str, Any]:
    out, rows = HERE / "runs" / f"seed-{seed}", HERE / "runs" / "pairs.jsonl"
    if not (out / "summary.json").is_file():
        print(f"seed {seed} ...", flush=True)
        pairs.write(rows)
        tree = {**config["recipe"], "data": {"train": str(rows), "held_out": config["held_out"]}}
        tree["train"] = {**tree["train"], "seed": seed}
        graftlm.train(build(Recipe, tree, source="config.yaml"), out, overwrite=True)
    summary = json.loads((out / "summary.json").read_text())
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "margin" in step]
    return {
        "held_out": summary["held_out"]["objective"],
        "first_margin": steps[0]["margin"],
        "last_ten_steps": {
            name: round(statistics.mean(step[name] for step in steps[-10:]), 4)
            for name in ("loss", "margin", "accuracy", "chosen_log_prob", "rejected_log_prob")
        },
    }


def main() -> None:
    tune_process()
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    seeds = {str(seed): one_seed(config, seed) for seed in config["seeds"]}
    names = next(iter(seeds.values()))["held_out"]["tuned"]
    change = {
        name: [round(found["held_out"]["tuned"][name] - found["held_out"]["base"][name], 4) for found in seeds.values()]
        for name in names
    }
    write_result(__file__, {"config": config, "seeds": seeds, "change_by_seed": change})


if __name__ == "__main__":
    main()
