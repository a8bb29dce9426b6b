"""Ranks that are allocated against ranks that are given, and DyLoRA's slices against LoRA.

    python benchmarks/allocation/run.py          what has not been run yet, then result.json
    python benchmarks/allocation/run.py table    result.json from what has been run

Every run is a line of runs.jsonl: what is there is not done again.
"""

import hashlib
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import commit, write_result  # noqa: E402

from graftlm.callbacks.dylora import use_rank  # noqa: E402
from graftlm.config.schema import build  # noqa: E402
from graftlm.evaluation.held_out import held_out_loss  # noqa: E402
from graftlm.hub.load import load_base  # noqa: E402
from graftlm.model.attach import detach  # noqa: E402
from graftlm.model.registry import hosts  # noqa: E402
from graftlm.prepare import prepare_data  # noqa: E402
from graftlm.recipe import Recipe  # noqa: E402
from graftlm.system import tune_process  # noqa: E402
from graftlm.training.phases import attach_deltas, make_batches  # noqa: E402
from graftlm.training.trainer import Trainer  # noqa: E402

CONFIG = yaml.safe_load((HERE / "config.yaml").read_text())
RUNS = HERE / "runs.jsonl"


def recipe(variant: str, rate: float, seed: int) -> Recipe:
    tree = {key: CONFIG[key] for key in ("base", "data")}
    chosen = CONFIG["variants"][variant]
    tree |= {"delta": chosen["delta"], "callbacks": chosen.get("callbacks", [])}
    tree["train"] = CONFIG["train"] | {"learning_rate": rate, "seed": seed}
    return build(Recipe, tree, source=f"benchmarks/allocation: {variant}")


def key(variant: str, rate: float, seed: int) -> str:
    job = {k: CONFIG[k] for k in ("base", "data", "train", "row_tokens", "held_out_rows")}
    chosen = {k: v for k, v in CONFIG["variants"][variant].items() if k != "rates"}
    return f"{variant} {rate:g} {seed} " + hashlib.sha256(json.dumps([job, chosen]).encode()).hexdigest()[:8]


def done() -> dict[str, dict[str, Any]]:
    lines = RUNS.read_text().splitlines() if RUNS.is_file() else []
    return {line["key"]: line for line in map(json.loads, lines)}


class Job:
    """The base and the rows of each seed, loaded once."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model, self.tokenizer = load_base(CONFIG["base"])

    def run(self, variant: str, rate: float, seed: int) -> dict[str, Any]:
        started, wanted = time.perf_counter(), recipe(variant, rate, seed)
        data = prepare_data(wanted, self.tokenizer)
        data = replace(data, examples=[e for e in data.examples if len(e) <= CONFIG["row_tokens"]])
        plan, setup = make_batches(wanted.train, data.examples), wanted.setup()
        attach_deltas(setup, self.model, data.examples, plan)
        trainer = Trainer(setup, self.model, data.examples, plan)
        losses = [round(step.loss, 4) for step in trainer.steps()]
        trainer.end()
        for host in hosts(self.model).values():
            host.deltas.eval()
        line: dict[str, Any] = {"key": key(variant, rate, seed), "variant": variant, "rate": rate, "seed": seed}
        line |= {"parameters": self.parameters(), "losses": losses, "held_out": {}, "commit": commit()}
        held_out = data.held_out[: CONFIG["held_out_rows"]]
        for rank in CONFIG["variants"][variant].get("ranks", ["all"]):
            if rank != "all":
                use_rank(self.model, rank)
            loss = held_out_loss(self.model, held_out, pack_tokens=CONFIG["train"]["pack_tokens"], packed=True)
            line["held_out"][str(rank)] = loss
        detach(self.model)
        return line | {"wall_s": round(time.perf_counter() - started, 1)}

    def parameters(self) -> int:
        """Numbers that still do something: of AdaLoRA, the triplets whose E is not zero."""
        count = 0
        for host in hosts(self.model).values():
            (delta,) = host.on()
            d = delta.site.d_in + delta.site.d_out
            by_name = dict(delta.named_parameters())
            count += (
                int(by_name["E"].count_nonzero()) * (d + 1)
                if "E" in by_name
                else sum(p.numel() for p in by_name.values())
            )
        return count


def first_loss(line: dict[str, Any]) -> float:
    return float(next(iter(line["held_out"].values())))


def best_rate(variant: str, have: dict[str, dict[str, Any]]) -> float:
    rates: list[float] = CONFIG["variants"][variant]["rates"]
    return (
        rates[0]
        if len(rates) == 1
        else min(rates, key=lambda rate: first_loss(have[key(variant, rate, CONFIG["sweep_seed"])]))
    )


def grid() -> None:
    have, job = done(), None
    for stage in ("sweep", *CONFIG["seeds"]):
        for variant, chosen in CONFIG["variants"].items():
            rates = chosen["rates"] if stage == "sweep" else [best_rate(variant, have)]
            for rate in rates if stage != "sweep" or len(rates) > 1 else []:
                task = (variant, rate, CONFIG["sweep_seed"] if stage == "sweep" else stage)
                if key(*task) in have:
                    continue
                job = job or Job()
                line = job.run(*task)
                have[line["key"]] = line
                with open(RUNS, "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{line['key']}: {line['held_out']}, {line['wall_s']} s", flush=True)


def table() -> dict[str, Any]:
    have, rows = done(), {}
    for variant, chosen in CONFIG["variants"].items():
        swept = {rate: have.get(key(variant, rate, CONFIG["sweep_seed"])) for rate in chosen["rates"]}
        if len(swept) > 1 and not all(swept.values()):
            continue
        rate = best_rate(variant, have)
        runs = {seed: have[k] for seed in CONFIG["seeds"] if (k := key(variant, rate, seed)) in have}
        if not runs:
            continue
        ranks = next(iter(runs.values()))["held_out"]
        rows[variant] = {
            "rate": rate,
            "sweep": {f"{r:g}": round(first_loss(line), 4) for r, line in swept.items() if line},
            "parameters": {seed: line["parameters"] for seed, line in runs.items()},
            "held_out_loss": {n: {seed: round(run["held_out"][n], 4) for seed, run in runs.items()} for n in ranks},
            "mean": {n: round(statistics.mean(run["held_out"][n] for run in runs.values()), 4) for n in ranks},
        }
    return {"config": CONFIG, "variants": rows, "bars": bars(rows)}


def bars(rows: dict[str, Any]) -> dict[str, Any]:
    """What issue 6 asks: allocation at least as good as uniform in each seed; DyLoRA's slice within 3 % of LoRA."""
    if not {"lora 8", "adalora 12 to 8", "dylora 64"} <= rows.keys():
        return {}
    uniform, allocated = rows["lora 8"]["held_out_loss"]["all"], rows["adalora 12 to 8"]["held_out_loss"]["all"]
    slices = rows["dylora 64"]["held_out_loss"]["8"]
    seeds = [seed for seed in uniform if seed in allocated and seed in slices]
    return {
        "allocated less uniform LoRA, nats": {seed: round(allocated[seed] - uniform[seed], 4) for seed in seeds},
        "rank 8 of DyLoRA over LoRA 8": {seed: round(slices[seed] / uniform[seed], 4) for seed in seeds},
    }


if __name__ == "__main__":
    tune_process()
    if sys.argv[1:] != ["table"]:
        grid()
    write_result(__file__, table())
