"""Peak memory and step time of full-parameter runs that save memory, against AdamW: a process each.

What is published is of a LLaMA of 7B, what is measured of SmolLM2, whose embeddings are a fifth of it. So beside what
was saved here stands what the shapes alone say, here and at 7B: where measuring agrees with shapes here, shapes are
what the published figure can be compared with.

Every run's result is kept in runs/ and not run again; delete runs/ to start over. See config.yaml for what is counted.

    python benchmarks/optimizers/run.py              everything, writes result.json
    python benchmarks/optimizers/run.py adamw lomo   only these, prints them
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm.config.schema import build  # noqa: E402
from graftlm.data.batches.pack import batches  # noqa: E402
from graftlm.data.chat.render import Renderer  # noqa: E402
from graftlm.data.quality.preflight import prepare  # noqa: E402
from graftlm.data.sources.load import load_rows  # noqa: E402
from graftlm.data.sources.source import DataConfig  # noqa: E402
from graftlm.hub.load import load_base  # noqa: E402
from graftlm.hub.tokenizer import load_tokenizer  # noqa: E402
from graftlm.recipe import Recipe  # noqa: E402
from graftlm.training.callback import Callback, Optimizer  # noqa: E402

RUNS = HERE / "runs"


def write_inputs(config: dict[str, Any]) -> None:
    """The rows of every step, and the base in bf16: converting a float32 file takes the memory of both."""
    RUNS.mkdir(exist_ok=True)
    if not (RUNS / "base").is_dir():
        model, tokenizer = load_base(config["base"], dtype="bfloat16")
        model.save_pretrained(RUNS / "base")
        tokenizer.save_pretrained(RUNS / "base")
    rows, _ = load_rows(config["rows"])
    examples, _ = prepare(rows[:400], Renderer(load_tokenizer(config["base"])), DataConfig(train=config["rows"]))
    with open(RUNS / "rows.jsonl", "w", encoding="utf-8") as out:
        for chosen in batches(len(examples), config["batch_rows"], config["steps"], config["seed"]):
            for example in (examples[i] for i in chosen):
                out.write(json.dumps({"ids": example.ids.tolist(), "weights": example.weights.tolist()}) + "\n")


def one_run(config: dict[str, Any], name: str, round_: int) -> dict[str, Any]:
    slug = "".join(c if c.isalnum() else "-" for c in name)
    out = RUNS / f"{slug}-{round_}.json"
    if not out.is_file():
        print(f"{out.stem} ...", flush=True)
        options = {"base": RUNS / "base", "rows": RUNS / "rows.jsonl", "out": out}
        flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        flags += ["--settings", json.dumps(config), "--sections", json.dumps(config["shapes"][name])]
        # Freed tensors go back to the system at once, so that what is resident is what is alive.
        allocator = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
        threads = {"OMP_NUM_THREADS": str(config["threads"]), "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, str(HERE / "one.py"), *flags], check=True, env=os.environ | allocator | threads)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def learning_by_shapes(
    callbacks: list[Callback], shape: dict[str, int]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(all parameters of a LLaMA that `full` trains, those of them that learn at a time)."""
    d, ff, heads = shape["d"], shape["ff"], shape.get("key_value", shape["d"])
    one = [(d, d), (heads, d), (heads, d), (d, d), (ff, d), (ff, d), (d, ff)]
    ends = [(shape["vocabulary"], d)] * (1 if shape.get("tied") else 2)

    def made(sizes: list[tuple[int, int]]) -> list[nn.Parameter]:
        return [nn.Parameter(torch.empty(size, device="meta")) for size in sizes]

    everything = made(ends + one * shape["layers"])
    layers = next((each.config.layers for each in callbacks if each.config.name == "lisa"), shape["layers"])
    return everything, everything[: len(ends) + len(one) * layers]


def callbacks_of(sections: dict[str, Any]) -> list[Callback]:
    """The optimizer and the callbacks of a recipe with these sections."""
    tree = {"data": {"train": "builtin:docstrings"}, "delta": {"method": "full"}, **sections}
    return build(Recipe, tree, source="config.yaml").setup().make_callbacks()


def saved_by_shapes(sections: dict[str, Any], of: str, sizes: list[int], shape: dict[str, int]) -> float:
    """The share of AdamW's gradients and moments, or of its moments, that is not there; `sizes` bytes each."""
    callbacks = callbacks_of(sections)
    (optimizer,) = (each for each in callbacks if isinstance(each, Optimizer))
    gradient, moments = sizes
    everything, learning = learning_by_shapes(callbacks, shape)
    whole = sum(p.numel() for p in everything)
    state_bytes = sum(map(optimizer.state_bytes, learning)) * moments / 8  # in float32, where AdamW's are 8
    if of == "moments":
        return 1 - state_bytes / (moments * whole)
    alive = (max if optimizer.fused else sum)(gradient * p.numel() for p in learning)
    return 1 - (alive + state_bytes) / ((gradient + moments) * whole)


def summarise(config: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians; each over AdamW's; and what is saved of AdamW's gradients and moments against what is published."""
    table = {
        name: {
            "peak_gib": round(statistics.median(run["peak_gib"] for run in runs), 3),
            "moments_gib": round(runs[0]["moments_gib"], 3),
            "step_s": round(statistics.median(t for run in runs for t in run["step_wall_s"][1:]), 2),
            "losses": [round(loss, 4) for loss in runs[0]["losses"]],
        }
        for name, runs in found.items()
    }
    adamw, gradients = table["adamw"], 4 * found["adamw"][0]["parameters"] / 2**30
    for row in table.values():
        less = adamw["peak_gib"] - row["peak_gib"]
        row["peak_ratio"] = round(row["peak_gib"] / adamw["peak_gib"], 3)
        row["step_ratio"] = round(row["step_s"] / adamw["step_s"], 2)
        row["saved of gradients and moments"] = round(less / (gradients + adamw["moments_gib"]), 3)
        row["saved of moments"] = round(1 - row["moments_gib"] / adamw["moments_gib"], 3)
    bars = {}
    for name, claim in config["published"].items():
        saved, ours = table[name][f"saved of {claim['of']}"], config["shapes"][name]
        here = saved_by_shapes(ours, claim["of"], [4, 8], config["smollm2"])
        there = saved_by_shapes(ours | claim.get("sections", {}), claim["of"], config["bytes"][name], config["seven_b"])
        agree = abs(saved / here - 1) <= config["tolerance"]
        bars[name] = claim | {
            "saved_here": saved,
            "by_shapes_here": round(here, 3),
            "by_shapes_at_7b": round(there, 3),
            "peak_here": table[name]["peak_ratio"],
            "met_here": abs(saved / claim["saved"] - 1) <= config["tolerance"],
            "met_at_7b_by_shapes": agree and abs(there / claim["saved"] - 1) <= config["tolerance"],
        }
    return {"table": table, "weights_gib": round(found["adamw"][0]["weights_gib"], 3), "bars": bars}


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    write_inputs(config)
    names = sys.argv[1:] or list(config["shapes"])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for round_ in range(config["rounds"]):
        for name in names:
            found[name].append(one_run(config, name, round_))
    if sys.argv[1:]:
        print(json.dumps(found, indent=1))
    else:
        write_result(__file__, {"config": config, **summarise(config, found)})


if __name__ == "__main__":
    main()
