"""A profile of one forward and backward pass: seconds by kind of work and by operation, with one thread and with two.

Each number of threads in a process of its own, since kernels that were compiled for one stay. What runs on one thread
whatever there is has a speed-up of 1. Wants an idle machine.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402


def profiled(config: dict[str, Any], threads: int, kernels: Any) -> dict[str, Any]:
    """{"wall_s", "parts_s": {kind: seconds}, "operations": {name: {"calls", "self_s"}}} of the fastest pass."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from graftlm import DataConfig, LoraConfig, Recipe, attach, load_base
    from graftlm.data.batches.pack import pack
    from graftlm.hub.tokenizer import load_tokenizer
    from graftlm.passes.autotune import fastest_backend
    from graftlm.planning.bench import ROWS, one_pass, parts_of_time
    from graftlm.prepare import prepare_data
    from graftlm.system import tune_process
    from graftlm.training.passes import Passes

    tune_process()
    torch.set_num_threads(threads)
    recipe = Recipe(data=DataConfig(train="builtin:docstrings"))
    examples = prepare_data(recipe, load_tokenizer(recipe.base)).examples
    model = load_base(recipe.base).model
    attach(model, LoraConfig(r=16, alpha=32))
    batch = max(pack(list(examples[: 4 * ROWS]), config["tokens"], share=False), key=lambda each: each.ids.numel())
    best: dict[str, Any] = {"wall_s": float("inf")}
    with Passes(backend=fastest_backend(model, [batch], kernels)).through(model):

        def work() -> None:
            one_pass(model, batch)

        work()
        for _ in range(config["tries"]):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                started = time.perf_counter()
                work()
                wall = time.perf_counter() - started
            if wall < best["wall_s"]:
                averages = sorted(seen.key_averages(), key=lambda each: -each.self_cpu_time_total)[: config["listed"]]
                operations = {
                    each.key: {"calls": each.count, "self_s": round(each.self_cpu_time_total / 1e6, 4)}
                    for each in averages
                }
                best = {"tokens": batch.ids.numel(), "wall_s": round(wall, 3), "operations": operations}
        shares = parts_of_time(work)
    return best | {"parts_s": {name: round(share * best["wall_s"], 3) for name, share in shares.items()}}


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    if len(sys.argv) > 1:
        print(json.dumps(profiled(config, int(sys.argv[1]), sys.argv[2])))
        return
    found: dict[str, Any] = {}
    for kernels in config["kernels"]:
        runs = {}
        for threads in config["threads"]:
            command = [sys.executable, __file__, str(threads), kernels]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[threads] = json.loads(output.splitlines()[-1])
        one, most = runs[min(runs)], runs[max(runs)]
        found[kernels] = {
            "by_threads": runs,
            "speed_up": {
                "all": round(one["wall_s"] / most["wall_s"], 2),
                **{part: round(s / max(most["parts_s"][part], 1e-9), 2) for part, s in one["parts_s"].items()},
            },
            "speed_up_of_operations": {
                name: round(each["self_s"] / most["operations"][name]["self_s"], 2)
                for name, each in one["operations"].items()
                if name in most["operations"]
            },
        }
    write_result(__file__, {"config": config, "found": found})


if __name__ == "__main__":
    main()
