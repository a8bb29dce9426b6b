"""Online RL on a reward that can be checked, for each kind of it: held-out answers before and after, by seed.

A run's folder is kept in runs/ and not run again (one that was stopped goes on); delete it to start over. `--smoke`
runs two steps of each with one seed, into runs/smoke/, and writes no result.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

import graftlm  # noqa: E402
from graftlm.config.schema import build  # noqa: E402
from graftlm.recipe import Recipe  # noqa: E402

SMOKE: dict[str, dict[str, Any]] = {
    "data": {"held_out": 4},
    "train": {"steps": 2, "batch_rows": 2},
    "rl": {"samples": 2, "max_new_tokens": 8},
    "report": {"answers": 4, "max_new_tokens": 8},
}


def one_run(config: dict[str, Any], name: str, seed: int, *, smoke: bool) -> dict[str, Any]:
    slug = "".join(c if c.isalnum() else "-" for c in name)
    out = HERE / "runs" / ("smoke" if smoke else "") / f"{slug}-{seed}"
    print(f"{name}, seed {seed} ...", flush=True)
    tree = {**config["recipe"], "loss": config["losses"][name]}
    if smoke:
        tree |= {section: {**tree[section], **changes} for section, changes in SMOKE.items()}
    scorer = {"by": "python", "function": f"{HERE / 'rewards.py'}:form"}
    length = config["steps_per_round"].get(name, 1)
    tree["rl"] = {**tree["rl"], "scorer": scorer, "steps_per_round": length}
    tree["train"] = {**tree["train"], "seed": seed, "learning_rate": config["learning_rate"]}
    graftlm.train(build(Recipe, tree, source="config.yaml"), out, resume=True)
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward" in line]
    done = [line for line in lines if "loss" in line]
    held_out = summary["held_out"]
    edge = max(1, len(steps) // 8)
    return {
        "held_out_reward": {side: round(held_out["objective"][side]["reward"], 4) for side in ("base", "tuned")},
        "held_out_rouge_l": {side: round(held_out["rouge_l"][side], 4) for side in ("base", "tuned")},
        "first_steps_reward": round(statistics.mean(line["reward"] for line in steps[:edge]), 4),
        "last_steps_reward": round(statistics.mean(line["reward"] for line in steps[-edge:]), 4),
        "no_signal": round(statistics.mean(line["no_signal"] for line in steps), 4),
        "generate_s_a_step": round(statistics.median(line["generate_s"] for line in steps), 3),
        "train_s_a_step": round(statistics.median(line["wall_s"] for line in done), 3) if done else None,
        "computed_share": round(sum(s["computed_tokens"] for s in done) / max(1, sum(s["tokens"] for s in done)), 3),
    }


def main() -> None:
    config, smoke = yaml.safe_load((HERE / "config.yaml").read_text()), "--smoke" in sys.argv
    seeds = config["seeds"][:1] if smoke else config["seeds"]
    runs = {name: {str(seed): one_run(config, name, seed, smoke=smoke) for seed in seeds} for name in config["losses"]}
    if smoke:
        print(json.dumps(runs, indent=1))
        return
    gains = {
        name: [round(run["held_out_reward"]["tuned"] - run["held_out_reward"]["base"], 4) for run in found.values()]
        for name, found in runs.items()
    }
    write_result(__file__, {"config": config, "runs": runs, "gain_of_held_out_reward_by_seed": gains})


if __name__ == "__main__":
    main()
