"""The time of a DPO step against TRL + PEFT: the same pairs, steps and threads, in alternating runs (rounds.py)."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import pairs as task
from rounds import compare

from graftlm.data.batches.groups import answers_of, groups
from graftlm.data.batches.pack import batches
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.preflight import prepare
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.source import DataConfig
from graftlm.hub.tokenizer import load_tokenizer

OPTIONS = ("steps", "batch_pairs", "seed", "warmup_steps", "learning_rate", "beta")


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
    compare(__file__, OPTIONS, write_rows, summarise)
