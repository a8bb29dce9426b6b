"""The memory of merging three LoRA adapters into SmolLM2 and writing the model.

    python benchmarks/merge_memory/run.py

Twice, each in a process of its own: with all adapters active (`graft merge`) and with weights (`combine.merge`). Base
and adapters are in memory before; what counts is the most that is resident above that, over a float32 model's bytes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import peak_rss_gib, write_result  # noqa: E402

from graftlm import LoraConfig, attach, detach, load_adapter, load_base, save_adapter  # noqa: E402
from graftlm.adapters.export.merged import merge_into  # noqa: E402
from graftlm.combine.merge import merge  # noqa: E402
from graftlm.model.registry import trainable  # noqa: E402
from graftlm.model.state_dict import base_parameters  # noqa: E402
from graftlm.system import resident_gib  # noqa: E402

CONFIG = yaml.safe_load((HERE / "config.yaml").read_text())
NAMES = [f"adapter-{number}" for number in range(CONFIG["adapters"])]


def write_adapters(folder: Path) -> None:
    model = load_base(CONFIG["base"], dtype=CONFIG["dtype"]).model
    for seed, name in enumerate(NAMES):
        attach(model, LoraConfig(r=CONFIG["r"]), name=name, seed=seed)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.add_(0.01)
        save_adapter(model, folder / name)
        detach(model)


def measure(how: str, folder: Path) -> dict[str, Any]:
    """In this process: memory before, and the most during, merging and writing."""
    model = load_base(CONFIG["base"], dtype=CONFIG["dtype"]).model
    for name in NAMES:
        load_adapter(model, folder / name, name=name)
    size = sum(4 * p.numel() for p in base_parameters(model).values()) / 2**30
    weights = dict(zip(NAMES, CONFIG["weights"], strict=True))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, at what is resident now
    before = resident_gib("VmRSS") or 0.0
    merge_into(model, folder / how, tensors=merge(model, weights) if how == "weighted" else None)
    above = peak_rss_gib() - before
    return {
        "float32_model_gib": round(size, 3),
        "before_gib": round(before, 3),
        "above_gib": round(above, 3),
        "share": round(above / size, 3),
    }


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder))
        for how in ("active", "weighted"):
            done = subprocess.run([sys.executable, __file__, how, folder], capture_output=True, text=True, check=True)
            found[how] = json.loads(done.stdout.splitlines()[-1])
            print(how, found[how])
    worst = max(each["share"] for each in found.values())
    write_result(__file__, {"config": CONFIG, **found, "most_share": worst, "holds": worst <= 1.3})


if __name__ == "__main__":
    main()
