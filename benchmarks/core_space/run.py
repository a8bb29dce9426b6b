"""TIES of 8 random LoRA adapters of SmolLM2 in core space and in product space: time and memory.

taskset -c 1 python benchmarks/core_space/run.py                 all rounds, then result.json
taskset -c 1 python benchmarks/core_space/run.py --rounds 1      a look, without a result

Each variant in each round is a process of its own. Base, its fingerprint and the adapters are in memory before; what
counts is the processor time of `compose` alone, and the most that is resident above what was before. The adapters are
float32; their products and the SVD of the result are float64 in both spaces.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import peak_rss_gib, write_result  # noqa: E402

from graftlm import load_base  # noqa: E402
from graftlm.adapters.adapter import Adapter  # noqa: E402
from graftlm.combine.compose import compose  # noqa: E402
from graftlm.combine.rules.ties import TiesConfig  # noqa: E402
from graftlm.hub.fingerprint import fingerprint  # noqa: E402
from graftlm.system import resident_gib  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_adapter(model: nn.Module, seed: int) -> Adapter:
    """In PEFT's layout, as another tool would write it. Of a trained size: B is not 0."""
    random, r, tensors = torch.Generator().manual_seed(seed), CONFIG["r"], {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            A = torch.randn(r, layer.in_features, generator=random) / layer.in_features**0.5
            B = 0.02 * torch.randn(layer.out_features, r, generator=random)
            tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    return Adapter(tensors, {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": TARGETS})


def measure(variant: str) -> dict[str, Any]:
    """In this process."""
    torch.set_num_threads(1)
    options = (CONFIG["variants"] | CONFIG["once"])[variant]
    model = load_base(CONFIG["base"], dtype="bfloat16").model
    fingerprint(model)
    adapters = [random_adapter(model, seed) for seed in range(CONFIG["adapters"])]
    size = sum(t.nbytes for adapter in adapters for t in adapter.tensors.values()) / 2**30
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, at what is resident now
    before, cpu, wall = resident_gib("VmRSS") or 0.0, time.process_time(), time.perf_counter()
    made = compose(model, adapters, by=TiesConfig(density=CONFIG["density"]), **options)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    above = peak_rss_gib() - before
    return {
        "cpu_s": round(cpu, 3),
        "wall_s": round(wall, 3),
        "adapters_gib": round(size, 4),
        "above_gib": round(above, 4),
        "above_share": round(above / size, 3),
        "largest_rank": max(report.rank for report in made.sites.values()),
        "largest_error": round(max(report.error for report in made.sites.values()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--variant", help="measure this one, in this process")
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(args.rounds or CONFIG["rounds"]):
        for variant in [*CONFIG["variants"], *(CONFIG["once"] if number == 0 else ())]:
            command = [sys.executable, __file__, "--variant", variant]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{variant}: {done.stderr[-3000:]}")
            found.setdefault(variant, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(variant, found[variant][-1], flush=True)
    times = {variant: statistics.median(run["cpu_s"] for run in runs) for variant, runs in found.items()}
    ratio = times["product"] / times["core"]
    share = max(run["above_share"] for run in found["core"])
    print(f"product / core: {ratio:.1f} times the time; core: {share:.2f} of the adapters' bytes")
    if not args.rounds:
        figures = {"time_ratio": round(ratio, 2), "core_above_share": share, "holds": ratio >= 5 and share <= 1.2}
        write_result(__file__, {"config": CONFIG, "runs": found, **figures})


if __name__ == "__main__":
    main()
