"""Training speed against TRL + PEFT: the same rows, steps and threads, in alternating runs, a process each.

Every run's result is kept in runs/ and not run again, so that the grid can be stopped and resumed; delete runs/ to
start over. See peer_trl.py for what its shapes are.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm.data.check import prepare  # noqa: E402
from graftlm.data.pack import batches  # noqa: E402
from graftlm.data.render import Renderer  # noqa: E402
from graftlm.data.source import DataConfig, load_rows, split  # noqa: E402
from graftlm.deltas.lora import LoraConfig  # noqa: E402
from graftlm.model.attach import attach  # noqa: E402
from graftlm.model.load import load_base, load_tokenizer  # noqa: E402
from graftlm.model.store import save_adapter  # noqa: E402


def write_rows(config: dict[str, Any], file: Path) -> None:
    """The rows of every step, in order, as ids and mask: both sides train on exactly these."""
    rows, _ = load_rows(config["rows"])
    train, _ = split(rows, 100, config["seed"])
    examples, _ = prepare(train, Renderer(load_tokenizer(config["base"])), DataConfig(train=config["rows"]))
    with open(file, "w", encoding="utf-8") as out:
        for chosen in batches(len(examples), config["batch_rows"], config["steps"], config["seed"]):
            for example in (examples[i] for i in chosen):
                row = {"input_ids": example.ids.tolist(), "completion_mask": example.weights.astype(int).tolist()}
                out.write(json.dumps(row) + "\n")


def write_base(config: dict[str, Any], folder: Path) -> None:
    """The base in bf16, as hubs have it, for both sides: converting a float32 file takes the memory of both."""
    if not folder.is_dir():
        model, tokenizer = load_base(config["base"], store="bf16")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def write_start(config: dict[str, Any], folder: Path) -> None:
    """The fresh adapter, in PEFT's files, that both sides train: so that losses can be compared step by step."""
    if not folder.is_dir():
        model = load_base(config["base"], store="bf16").model
        attach(model, LoraConfig(r=16, alpha=32), seed=config["seed"])
        save_adapter(model, folder)


def one_run(config: dict[str, Any], command: list[str], threads: int, rows: Path, out: Path) -> dict[str, Any]:
    if not out.is_file():
        print(f"{out.stem} ...", flush=True)
        options: dict[str, Any] = {"base": rows.parent / "base", "rows": rows, "out": out, "threads": threads}
        options["start"] = rows.parent / "start"
        options |= {key: config[key] for key in ("steps", "batch_rows", "seed", "warmup_steps", "learning_rate")}
        flags = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        script = [sys.executable, str(HERE / command[0]), *command[1:], *flags]
        subprocess.run(script, check=True, env=environment, capture_output=True)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    runs, rows = HERE / "runs", HERE / "runs" / "rows.jsonl"
    runs.mkdir(exist_ok=True)
    write_rows(config, rows)
    write_base(config, runs / "base")
    write_start(config, runs / "start")
    found: dict[int, dict[str, list[dict[str, Any]]]] = {threads: {} for threads in config["threads"]}
    for round_ in range(config["rounds"]):
        for threads in config["threads"]:
            for name, command in (config["shapes"] | (config["once"] if round_ == 0 and threads == 1 else {})).items():
                slug = "".join(c if c.isalnum() else "-" for c in name)
                out = runs / f"{slug}-{threads}t-{round_}.json"
                found[threads].setdefault(name, []).append(one_run(config, command, threads, rows, out))
    write_result(__file__, {"config": config, "threads": {str(t): summarise(shapes) for t, shapes in found.items()}})


def summarise(shapes: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and how each of ours compares with the fastest peer that is configuration only."""
    table = {
        name: {
            "tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in runs), 1),
            "steady_tokens_per_s": round(statistics.median(map(steady, runs)), 1),
            "all_tokens_per_s": [round(r["tokens_per_s"], 1) for r in runs],
            "computed_share": round(runs[0].get("computed_tokens", runs[0]["tokens"]) / runs[0]["tokens"], 3),
            "peak_rss_gib": round(statistics.median(r["peak_rss_gib"] for r in runs), 2),
            "losses": [round(loss, 4) for loss in runs[0]["losses"]],
        }
        for name, runs in shapes.items()
    }
    best = max((name for name in table if name.startswith("peer")), key=lambda name: table[name]["tokens_per_s"])
    ratios = {
        name: {
            "to the best peer": round(row["tokens_per_s"] / table[best]["tokens_per_s"], 2),
            "to the best peer, steady": round(row["steady_tokens_per_s"] / table[best]["steady_tokens_per_s"], 2),
            "peak memory": round(row["peak_rss_gib"] / table[best]["peak_rss_gib"], 2),
            "loss differs at most by": round(
                max(abs(a / b - 1) for a, b in zip(row["losses"], table[best]["losses"], strict=True)), 4
            ),
            **{
                f"to {other}": round(row["tokens_per_s"] / table[other]["tokens_per_s"], 2)
                for other in ("as documented", "tuned beyond configuration")
                if other in table
            },
        }
        for name, row in table.items()
        if name.startswith("ours")
    }
    return {"table": table, "best_peer": best, "ratios": ratios}


def steady(run: dict[str, Any]) -> float:
    """Tokens per second without the first three steps, which warm caches and compile kernels on every side."""
    share = 1 - 3 / run["steps"]  # rows are shuffled: tokens are spread evenly over the steps, on average
    return float(run["tokens"] * share / sum(run["step_wall_s"][3:]))


if __name__ == "__main__":
    main()
