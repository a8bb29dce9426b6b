"""The default of `train.kernels` against each backend that can be pinned: steps in turn, in one process.

The ratio of a backend is the median of its steps over the median of auto's; above 1 auto is faster. Its interval is the
middle 95 % of that ratio over steps drawn again with replacement. A part is one recipe on one number of threads, in a
process of its own; what is done stays in runs/. Wants an idle machine.

    python benchmarks/kernels/run.py                      # all parts that are missing, then result.json
    python benchmarks/kernels/run.py THREADS RECIPE       # one part
"""

import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import machine, write_result  # noqa: E402

DRAWS = 2000


def part(config: dict[str, Any], threads: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """{"tokens_per_s", "ratios", "step_s", "choice"} of one recipe on this number of threads."""
    from graftlm.system import tune_process

    tune_process()

    import torch

    from graftlm import DataConfig, LoraConfig, Recipe, attach, load_base
    from graftlm.data.batches.pack import batches, pack
    from graftlm.model.registry import trainable
    from graftlm.optim.adamw import adamw
    from graftlm.passes.autotune import choose
    from graftlm.prepare import prepare_data
    from graftlm.training.loop import TrainStep
    from graftlm.training.passes import Passes
    from graftlm.training.state import TrainingState

    torch.set_num_threads(threads)
    model, tokenizer = load_base(config["base"], dtype="bfloat16")
    examples = prepare_data(Recipe(data=DataConfig(train=config["rows"])), tokenizer).examples
    chosen = batches(len(examples), config["batch_rows"], config["steps"] + 1, 0)
    packs = [pack([examples[i] for i in rows], recipe["pack_tokens"], share=recipe["share"]) for rows in chosen]
    attach(model, LoraConfig(r=16, alpha=32), seed=0)
    choices = {name: choose(model, [p for some in packs for p in some], name) for name in config["kernels"]}
    runs = {}
    for name, choice in choices.items():
        training = TrainingState(model, {}, adamw([(trainable(model).values(), 1e-5)], weight_decay=0.0))
        backend = choice.backend(model.device, model.dtype)
        passes = Passes(checkpointing=recipe.get("checkpointing", False), backend=backend)
        runs[name] = TrainStep(training, "supervised", lambda step: 1.0, clip=1.0, passes=passes).over(packs)
        next(runs[name])  # a first step, which is not counted: it compiles code and fills caches
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tokens = 0
    for number in range(config["steps"]):
        names = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
        for name in names:
            started = time.perf_counter()
            step = next(runs[name])
            seconds[name].append(time.perf_counter() - started)
        if number % 5 == 4:
            print(f"{number + 1} of {config['steps']} steps", flush=True)
        tokens += step.tokens
    return {
        "tokens_per_s": {name: round(tokens / sum(each), 1) for name, each in seconds.items()},
        "ratios": {name: ratio(each, seconds["auto"]) for name, each in seconds.items() if name != "auto"},
        "step_s": {name: [round(s, 4) for s in each] for name, each in seconds.items()},
        "choice": choices["auto"].to_json(),
        "lines": choices["auto"].lines(),
        "machine": machine(),
    }


def ratio(seconds: list[float], of_auto: list[float]) -> dict[str, float]:
    draw = random.Random(0)

    def median(some: list[float]) -> float:
        return statistics.median(draw.choices(some, k=len(some)))

    drawn = sorted(median(seconds) / median(of_auto) for _ in range(DRAWS))
    center = statistics.median(seconds) / statistics.median(of_auto)
    low, high = drawn[round(0.025 * DRAWS)], drawn[round(0.975 * DRAWS) - 1]
    return {"median": round(center, 3), "low": round(low, 3), "high": round(high, 3)}


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    runs = HERE / "runs"
    runs.mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        threads, name = int(sys.argv[1]), sys.argv[2]
        slug = f"{threads}t-{''.join(c if c.isalnum() else '-' for c in name)}"
        (runs / f"{slug}.json").write_text(json.dumps(part(config, threads, config["recipes"][name]), indent=1) + "\n")
        return
    found: dict[str, Any] = {}
    for threads in config["threads"]:
        for name in config["recipes"]:
            file = runs / f"{threads}t-{''.join(c if c.isalnum() else '-' for c in name)}.json"
            if not file.is_file():
                print(f"{threads} threads, {name} ...", flush=True)
                subprocess.run([sys.executable, __file__, str(threads), name], check=True)
            found.setdefault(str(threads), {})[name] = json.loads(file.read_text())
    write_result(__file__, {"config": config, "threads": found})


if __name__ == "__main__":
    main()
