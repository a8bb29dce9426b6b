"""Training speed against TRL + PEFT: the same rows, steps and threads, in alternating runs (rounds.py).

See peer_trl.py for what its shapes are.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from rounds import compare

from graftlm.data.batches.pack import batches
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.preflight import prepare
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.source import DataConfig
from graftlm.data.sources.splits import split
from graftlm.hub.tokenizer import load_tokenizer

OPTIONS = ("steps", "batch_rows", "seed", "warmup_steps", "learning_rate")
WARM = 3
"""How many steps warm up."""


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


def summarise(shapes: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and how each of ours compares with the fastest peer that is configuration only.

    Speeds are of steady steps: torch.compile takes minutes in the first ones, which a long run does not notice.
    """
    table = {
        name: {
            "tokens_per_s": round(statistics.median(map(steady, runs)), 1),
            "all_tokens_per_s": [round(steady(run), 1) for run in runs],
            "first_steps_s": round(statistics.median(sum(run["step_wall_s"][:WARM]) for run in runs), 1),
            "computed_share": round(runs[0].get("computed_tokens", runs[0]["tokens"]) / runs[0]["tokens"], 3),
            "peak_rss_gib": round(statistics.median(run["peak_rss_gib"] for run in runs), 2),
            "losses": [round(loss, 4) for loss in runs[0]["losses"]],
        }
        for name, runs in shapes.items()
    }
    truth = [name for name in table if "float32" in name]
    best = max((name for name in table if name.startswith("peer,")), key=lambda name: table[name]["tokens_per_s"])
    ratios = {
        name: {
            "to the best peer": round(row["tokens_per_s"] / table[best]["tokens_per_s"], 2),
            "rounds, to the best peer": [
                round(ours / peers, 2)
                for ours, peers in zip(row["all_tokens_per_s"], table[best]["all_tokens_per_s"], strict=False)
            ],
            "peak memory": round(row["peak_rss_gib"] / table[best]["peak_rss_gib"], 2),
            "loss differs at most by": _apart(row["losses"], table[best]["losses"]),
            **{
                f"loss differs from {exact} at most by": _apart(row["losses"], table[exact]["losses"])
                for exact in truth
            },
            **{
                f"to {other}": round(row["tokens_per_s"] / table[other]["tokens_per_s"], 2)
                for other in table
                if not other.startswith("ours")
            },
        }
        for name, row in table.items()
        if name.startswith("ours")
    }
    for exact in truth:
        table[best][f"loss differs from {exact} at most by"] = _apart(table[best]["losses"], table[exact]["losses"])
    return {"table": table, "best_peer": best, "ratios": ratios}


def _apart(losses: list[float], others: list[float]) -> float:
    return round(max(abs(a / b - 1) for a, b in zip(losses, others, strict=True)), 4)


def steady(run: dict[str, Any]) -> float:
    """Tokens per second without the first steps, which warm caches and compile kernels on every side."""
    share = 1 - WARM / run["steps"]  # rows are shuffled: tokens are spread evenly over the steps, on average
    return float(run["tokens"] * share / sum(run["step_wall_s"][WARM:]))


if __name__ == "__main__":
    compare(__file__, OPTIONS, write_rows, summarise)
