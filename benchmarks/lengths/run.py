"""Memory and time of a LoRA step against the length of a row and against the rank, a process for each point.

Rows are random ids: neither memory nor time depends on which. Peak memory is the process's, less what it held before
the first step. Every point is kept in runs/ and not measured again; delete runs/ to start over.
"""

import argparse
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


def point(config: dict[str, Any], lengths: list[int], rank: int) -> dict[str, Any]:
    """A few steps over one pack of rows of these lengths."""
    os.environ |= {"OMP_NUM_THREADS": str(config["threads"])}
    import numpy as np
    import torch
    from machine import peak_rss_gib

    from graftlm import LoraConfig, attach, load_base
    from graftlm.data.batches.pack import Example, collate
    from graftlm.model.registry import trainable
    from graftlm.optim.adamw import adamw
    from graftlm.passes.autotune import fastest_backend
    from graftlm.system import tune_process
    from graftlm.training.loop import TrainStep
    from graftlm.training.passes import Passes
    from graftlm.training.schedule import warmup_cosine
    from graftlm.training.state import TrainingState

    tune_process()
    torch.set_num_threads(config["threads"])
    random = np.random.default_rng(config["seed"])
    rows = []
    for length in lengths:
        weights = np.zeros(length, np.float32)
        weights[-max(1, int(config["supervised"] * length)) :] = 1
        rows.append(Example(random.integers(100, 40_000, length).astype(np.int32), weights, "random"))
    model, _ = load_base(config["base"])
    attach(model, LoraConfig(r=rank, alpha=2 * rank), seed=config["seed"])
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    backend = fastest_backend(model, [collate(rows)])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    training = TrainingState(model, {}, adamw([(trainable(model).values(), 1e-4)], weight_decay=0.0))
    schedule, passes = warmup_cosine(steps=config["steps"], warmup_steps=0), Passes(backend=backend)
    train_step = TrainStep(training, "supervised", schedule, clip=1.0, passes=passes)
    done = list(train_step.over([collate(rows)] for _ in range(config["steps"])))
    peak = peak_rss_gib()
    step_s = statistics.median(step.wall_s for step in done[1:])
    return {
        "tokens": sum(lengths),
        "r": rank,
        "resident_before_gib": round(resident, 3),
        "peak_gib": round(peak, 3),
        "step_s": round(step_s, 3),
        "ms_per_token": round(1000 * step_s / sum(lengths), 4),
        "all_steps_s": [round(step.wall_s, 3) for step in done],
    }


def measured(name: str, lengths: list[int], rank: int) -> dict[str, Any]:
    file = HERE / "runs" / f"{name}.json"
    if not file.is_file():
        print(f"{name} ...", flush=True)
        file.parent.mkdir(exist_ok=True)
        options = ["--rank", str(rank), "--lengths", *map(str, lengths)]
        out = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True).stdout
        file.write_text(out.splitlines()[-1] + "\n")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def line_through(points: list[dict[str, Any]]) -> tuple[float, float]:
    """Least squares: peak_gib = a + b tokens."""
    import numpy as np

    b, a = np.polyfit([p["tokens"] for p in points], [p["peak_gib"] for p in points], 1)
    return float(a), float(b)


def attention_flop(base: str, length: int) -> float:
    """Forward and backward of one causal row, recomputation not counted: 6 products of [L, L / 2, D] a head."""
    from graftlm.hub.config import BaseConfig
    from graftlm.hub.sketch import read_config

    config = read_config(BaseConfig(name=base)).get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 6 * 2 * length * (length / 2) * size * config.num_attention_heads * config.num_hidden_layers


def main() -> None:
    from machine import write_result

    config = yaml.safe_load((HERE / "config.yaml").read_text())
    by_length = [measured(f"length {n}", [n], config["r"]) for n in config["lengths"]]
    rows = [config["rank_row"]] * (config["rank_length"] // config["rank_row"])
    by_rank = [measured(f"rank {r}", rows, r) for r in config["ranks"]]
    a, b = line_through(by_length[:-1])
    longest, short = by_length[-1], next(p for p in by_length if p["tokens"] == 1024)
    flop = {p["tokens"]: attention_flop(config["base"], p["tokens"]) / p["tokens"] for p in (longest, short)}
    more_s = (longest["ms_per_token"] - short["ms_per_token"]) / 1000
    result = {
        "config": config,
        "memory": {
            "gib": a,
            "gib_per_1024_tokens": 1024 * b,
            "longest_over_the_line": longest["peak_gib"] / (a + b * longest["tokens"]),
        },
        "time": {
            "attention_mflop_per_token": {tokens: value / 1e6 for tokens, value in flop.items()},
            "more_ms_per_token_at_the_longest": 1000 * more_s,
            "gflops_of_what_attention_adds": (flop[longest["tokens"]] - flop[1024]) / more_s / 1e9,
        },
        "r64_over_r1": next(p for p in by_rank if p["r"] == 64)["step_s"] / by_rank[0]["step_s"],
        "by_length": by_length,
        "by_rank": by_rank,
    }
    print(json.dumps({key: result[key] for key in ("memory", "time", "r64_over_r1")}, indent=1))
    write_result(__file__, result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--rank", type=int)
    args = parser.parse_args()
    if args.lengths:
        settings = yaml.safe_load((HERE / "config.yaml").read_text())
        print(json.dumps(point(settings, args.lengths, args.rank)))
    else:
        main()
