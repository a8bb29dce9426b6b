"""Which configuration of TRL + PEFT is its fastest on this processor: every combination of attention, rows that are
computed together, and autocast; then torch.compile on the fastest of them, since it takes minutes to compile.

A run of a few steps for each, in a process of its own, on one thread; by processor time, so that a busy machine changes
little. Every run's result stays in runs/, so that the grid can be stopped and resumed. Writes grid.json: the fastest is
what `peer, ...` in config.yaml stands for.
"""

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import machine  # noqa: E402
from rounds import one_run, write_base, write_start  # noqa: E402
from run import OPTIONS, write_rows  # noqa: E402

STEPS = 6
GRID = (
    [["--attention", "eager"], ["--attention", "sdpa"]],
    [["--micro-rows", "1"], ["--micro-rows", "2"], ["--micro-rows", "8"], ["--pack", "1024"]],
    [[], ["--autocast"]],
)
COMPILED = 2
"""Of the fastest combinations, how many are run with torch.compile too."""


def measured(given: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """One row of the table."""
    slug = "-".join(word.strip("-") for word in words)
    try:
        file = HERE / "runs" / f"grid-{slug}.json"
        found = one_run(HERE, ["peer_trl.py", "--shape", "grid", *words], dict(given), file)
    except SystemExit as failed:
        return {"options": words, "failed": str(failed)[-300:]}
    row = {
        "options": words,
        "tokens_per_cpu_s": round(found["tokens"] / found["steps"] / statistics.median(found["step_cpu_s"][1:]), 1),
        "first_step_cpu_s": round(found["step_cpu_s"][0], 1),
        "peak_rss_gib": round(found["peak_rss_gib"], 2),
    }
    print(row, flush=True)
    return row


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    runs = HERE / "runs"
    runs.mkdir(exist_ok=True)
    write_rows(config, runs / "rows.jsonl")
    write_base(config, runs / "base")
    write_start(config, runs / "start")
    given: dict[str, Any] = {key: config[key] for key in OPTIONS} | {"threads": 1, "steps": STEPS}
    table = [measured(given, [word for some in point for word in some]) for point in itertools.product(*GRID)]
    table.sort(key=lambda row: -row.get("tokens_per_cpu_s", 0))
    table += [measured(given, [*row["options"], "--compile"]) for row in table[:COMPILED]]
    table.sort(key=lambda row: -row.get("tokens_per_cpu_s", 0))
    (HERE / "grid.json").write_text(
        json.dumps({"machine": machine(), "steps": STEPS, "rows": config["rows"], "grid": table}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
