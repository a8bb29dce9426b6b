"""The time of a DPO step against TRL + PEFT: the same pairs, steps and threads, in alternating runs, a process each.

Every run's result is kept in runs/ and not run again, so that the grid can be stopped and resumed; delete runs/ to
start over.
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

import pairs as task  # noqa: E402
from machine import write_result  # noqa: E402

from graftlm.data.check import prepare  # noqa: E402
from graftlm.data.compare import answers_of, groups  # noqa: E402
from graftlm.data.pack import batches  # noqa: E402
from graftlm.data.render import Renderer  # noqa: E402
from graftlm.data.source import DataConfig, load_rows  # noqa: E402
from graftlm.deltas.lora import LoraConfig  # noqa: E402
from graftlm.model.attach import attach  # noqa: E402
from graftlm.model.load import load_base, load_tokenizer  # noqa: E402
from graftlm.model.store import save_adapter  # noqa: E402


def write_rows(config: dict[str, Any], file: Path) -> None:
    """The pairs of every step, in order, as ids: both sides train on exactly these."""
    task.write(file.parent / "pairs.jsonl")
    data = DataConfig(train=str(file.parent / "pairs.jsonl"))
    rows, _ = load_rows(data.sources()[0])
    examples, _ = prepare(answers_of(rows), Renderer(load_tokenizer(config["base"])), data)
    found, _, _ = groups(rows, examples, "pairs")
    with open(file, "w", encoding="utf-8") as out:
        for chosen in batches(len(found), config["batch_pairs"], config["steps"], config["seed"]):
            for group in (found[i] for i in chosen):
                prompt = int(group.answers[0].weights.nonzero()[0][0])
                row = {"prompt_ids": group.answers[0].ids[:prompt].tolist()}
                for kind, answer in zip(("chosen", "rejected"), group.answers, strict=True):
                    end = int(answer.weights.nonzero()[0][-1]) + 1  # what the template writes behind it is not trained
                    assert answer.weights[prompt:end].all()
                    row[f"{kind}_ids"] = answer.ids[prompt:end].tolist()
                out.write(json.dumps(row) + "\n")


def write_base(config: dict[str, Any], folder: Path) -> None:
    """The base in bf16, as hubs have it, for both sides."""
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
        keys = ("steps", "batch_pairs", "seed", "warmup_steps", "learning_rate", "beta")
        options |= {key: config[key] for key in keys}
        flags = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        script = [sys.executable, str(HERE / command[0]), *command[1:], *flags]
        done = subprocess.run(
            script, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(script)}\n{done.stderr[-3000:]}")
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
    """Medians, and how ours compares with the fastest peer: its steps alone, and with what it computes beforehand."""
    table = {
        name: {
            "step_s": round(statistics.median(s for r in runs for s in r["step_wall_s"][2:]), 3),
            "all_steps_s": [round(r["train_wall_s"], 2) for r in runs],
            "with_beforehand_s": round(statistics.median(r["train_wall_s"] + r["beforehand_s"] for r in runs), 2),
            "computed_share": round(runs[0]["computed_tokens"] / runs[0]["tokens"], 3),
            "peak_rss_gib": round(statistics.median(r["peak_rss_gib"] for r in runs), 2),
            "losses": [round(loss, 4) for loss in runs[0]["losses"]],
            "margins": [round(margin, 4) for margin in runs[0]["margins"]],
        }
        for name, runs in shapes.items()
    }
    peers = [name for name in table if name.startswith("peer")]
    ours = table["ours"]
    return {
        "table": table,
        "ratios": {
            "step, to the best peer": round(min(table[n]["step_s"] for n in peers) / ours["step_s"], 2),
            "run with what is computed beforehand, to the best peer": round(
                min(table[n]["with_beforehand_s"] for n in peers) / ours["with_beforehand_s"], 2
            ),
            **{
                f"step, to {name}": round(table[name]["step_s"] / ours["step_s"], 2) for name in table if name != "ours"
            },
        },
    }


if __name__ == "__main__":
    main()
