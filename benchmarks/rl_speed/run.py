"""The wall time of online RL now and in another checkout, in turns.

    git worktree add /tmp/before efc8d5e && python benchmarks/rl_speed/run.py --before /tmp/before
    ... --pairs 1 --steps 4      a look, without a result

A run is a process of its own, and its result stays in runs/ and is not run again; its time is that of its steps,
generating and training, as it measured them itself.
"""

import argparse
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
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
RL = HERE.parent / "rl"


def recipe(steps: int) -> dict[str, Any]:
    config = yaml.safe_load((RL / "config.yaml").read_text())
    tree: dict[str, Any] = config["recipe"] | {"loss": config["losses"]["GRPO"]}
    tree["rl"] = tree["rl"] | {"scorer": {"by": "python", "function": f"{RL / 'rewards.py'}:form"}}
    tree["train"] = tree["train"] | {"steps": steps, "learning_rate": config["learning_rate"]}
    tree["report"] = {"answers": 0, "samples": 0}
    return tree


def run(checkout: Path, steps: int) -> dict[str, float]:
    """Seconds of all steps: {generate, train, all}."""
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, "recipe.yaml"), Path(folder, "out")
        file.write_text(yaml.safe_dump(recipe(steps)))
        command = [sys.executable, "-m", "graftlm", "train", str(file), "--out", str(out)]
        env = os.environ | {"PYTHONPATH": str(checkout)}  # the folder comes first for `-m`
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit((done.stderr or done.stdout)[-2000:])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    generate = sum(line["generate_s"] for line in lines if "generate_s" in line)
    train = sum(line["wall_s"] for line in lines if "loss" in line)
    return {"generate": round(generate, 2), "train": round(train, 2), "all": round(generate + train, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--pairs", type=int, default=CONFIG["pairs"])
    parser.add_argument("--steps", type=int, default=CONFIG["steps"])
    args = parser.parse_args()
    sides = {"before": args.before.resolve(), "now": HERE.parents[1]}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(args.pairs):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            file = HERE / "runs" / f"{args.steps}-{name}-{number}.json"
            if not file.is_file():
                found = run(sides[name], args.steps)
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(found) + "\n")
            runs[name].append(json.loads(file.read_text()))
            print(number, name, runs[name][-1], flush=True)
    ratios = [b["all"] / n["all"] for b, n in zip(runs["before"], runs["now"], strict=True)]
    ratio = round(statistics.median(ratios), 2)
    print("before / now:", [round(each, 2) for each in ratios], ratio)
    if (args.pairs, args.steps) == (CONFIG["pairs"], CONFIG["steps"]):
        git = ["git", "-C", str(args.before), "describe", "--always", "--dirty=+"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        write_result(__file__, {"config": CONFIG, "before": commit, "seconds": runs, "ratios": ratios, "ratio": ratio})


if __name__ == "__main__":
    main()
