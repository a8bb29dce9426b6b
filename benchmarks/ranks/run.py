"""One process with all threads against several processes: the same job by the same command, in alternating runs."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402


def one_run(config: dict[str, Any], processes: int, threads: int, changes: list[str], out: Path) -> dict[str, Any]:
    """What a run says of itself: tokens per second of the steady steps, the loss of each step, the largest process."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    words = ["train", str(ROOT / config["recipe"]), *config["changes"], f"train.threads={threads}", *changes]
    command = [sys.executable, *launch, "-m", "graftlm", *words, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, cwd=ROOT, capture_output=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]  # the others are events
    steady = steps[config["skipped_steps"] :]
    return {
        "tokens_per_s": sum(s["tokens"] for s in steady) / sum(s["wall_s"] for s in steady),
        "losses": [s["loss"] for s in steps],
        "peak_rss_gib": json.loads((out / "summary.json").read_text())["train"]["peak_rss_gib"],
    }


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in config["shapes"]}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(config["rounds"]):
            for index, (name, (processes, threads, *changes)) in enumerate(config["shapes"].items()):
                print(f"round {number + 1}: {name} ...", flush=True)
                runs[name].append(one_run(config, processes, threads, changes, Path(folder, f"{number}-{index}")))
    first = next(iter(runs.values()))
    wanted, speeds = first[0]["losses"], [r["tokens_per_s"] for r in first]
    table = {
        name: {
            "tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in done), 1),
            "all_tokens_per_s": [round(r["tokens_per_s"], 1) for r in done],
            "ratio": round(
                statistics.median(r["tokens_per_s"] / base for r, base in zip(done, speeds, strict=True)), 3
            ),
            "peak_rss_gib_of_the_largest_process": round(max(r["peak_rss_gib"] for r in done), 2),
            "loss_differs_by_at_most": max(abs(a - b) for r in done for a, b in zip(r["losses"], wanted, strict=True)),
        }
        for name, done in runs.items()
    }
    write_result(__file__, {"config": config, "table": table})


if __name__ == "__main__":
    main()
