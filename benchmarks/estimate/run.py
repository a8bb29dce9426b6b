"""What `graft estimate` says of twenty recipes against what they then need, each in two processes of its own.

Peak memory is the run's whole, from its summary.json; the time of a step is the median over metrics.jsonl, the first
step left out. Every pair is kept in runs/ and not measured again; delete runs/ to start over. Names of recipes on the
command line run these alone. Wants an idle machine for its times.
"""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import pairs  # noqa: E402
from machine import write_result  # noqa: E402


def graft(*arguments: str) -> str:
    command = [sys.executable, "-m", "graftlm", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(recipe: Path, overrides: list[str], folder: Path) -> dict[str, Any]:
    estimate = json.loads(graft("estimate", str(recipe), *overrides, "--json"))
    graft("train", str(recipe), *overrides, "--out", str(folder), "--overwrite")
    peak = json.loads((folder / "summary.json").read_text())["train"]["peak_rss_gib"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["wall_s"] for line in lines if "loss" in line]  # the others are events
    shutil.rmtree(folder)
    step_s = statistics.median(steps[1:])
    return {
        "peak_gib": {
            "estimated": estimate["peak_gib"],
            "measured": round(peak, 3),
            "error": estimate["peak_gib"] / peak - 1,
        },
        "step_s": {
            "estimated": estimate["step_s"],
            "measured": round(step_s, 3),
            "error": estimate["step_s"] / step_s - 1,
        },
        "all_steps_s": steps,
        "estimate": estimate,
    }


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    runs = HERE / "runs"
    runs.mkdir(exist_ok=True)
    recipe = runs / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config["common"]))
    pairs.write(runs / "pairs.jsonl")
    recipes = config["recipes"] | config["held_out"]
    unknown = set(sys.argv[1:]) - set(recipes)
    assert not unknown, f"no such recipe: {unknown}"
    found = {}
    for name in sys.argv[1:] or recipes:
        file = runs / f"{name}.json"
        if not file.is_file():
            overrides = [words.replace("{pairs}", str(runs / "pairs.jsonl")) for words in recipes[name]]
            file.write_text(json.dumps(measure(recipe, overrides, runs / "adapter")) + "\n")
        found[name] = json.loads(file.read_text())
        for key in ("peak_gib", "step_s"):
            figures = found[name][key]
            print(f"{name:30} {key:9}{figures['planned']:8.2f}{figures['measured']:8.2f}{figures['error']:+8.1%}")
    if not sys.argv[1:]:
        worst, worst_held_out = (
            {key: max(abs(found[name][key]["error"]) for name in names) for key in ("peak_gib", "step_s")}
            for names in (recipes, config["held_out"])
        )
        print(f"worst: {worst}, of those held out: {worst_held_out}")
        write_result(__file__, {"config": config, "worst": worst, "worst_held_out": worst_held_out, "recipes": found})


if __name__ == "__main__":
    main()
