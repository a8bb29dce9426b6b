"""A library of 500 tiny adapters: bytes of its index, and time of listing it and of finding near-duplicates.

taskset -c 1 python benchmarks/library/run.py                 all rounds, then result.json
taskset -c 1 python benchmarks/library/run.py --bytes         what needs no clock, without a result

Adapters are random LoRA on all linear layers of the tiny model, in PEFT's files. Some are copies of others in other
factors, (B R, R^-1 A): the near-duplicates that are found must be these and no others. The times are of this process,
with all libraries imported and the files in the page cache.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm.adapters.adapter import Adapter  # noqa: E402
from graftlm.library.library import INDEX, add, read_library, verify  # noqa: E402
from graftlm.library.similarity import near_duplicates, similarities  # noqa: E402
from graftlm.testing import tiny_model  # noqa: E402

CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())
PREFIX = "base_model.model."


def random_adapter(model: nn.Module, seed: int, other_factors: bool) -> Adapter:
    """A LoRA of this seed; with `other_factors` the same change, as (B R, R^-1 A)."""
    random, r, tensors = torch.Generator().manual_seed(seed), CONFIG["ranks"][seed % len(CONFIG["ranks"])], {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            A = torch.randn(r, layer.in_features, generator=random, dtype=torch.float64)
            B = torch.randn(layer.out_features, r, generator=random, dtype=torch.float64)
            R = torch.randn(r, r, generator=random, dtype=torch.float64) + 2 * torch.eye(r)
            if other_factors:
                A, B = torch.linalg.solve(R, A), B @ R
            tensors |= {f"{PREFIX}{name}.lora_A.weight": A.float(), f"{PREFIX}{name}.lora_B.weight": B.float()}
    return Adapter(tensors, {"peft_type": "LORA", "r": r, "lora_alpha": 16, "target_modules": "all-linear"})


def fill(folder: Path) -> dict[str, str]:
    """Make the library; returns copy -> original."""
    model, copies = tiny_model(), {}
    originals = CONFIG["adapters"] - CONFIG["copies"]
    for number in range(CONFIG["adapters"]):
        name = f"adapter-{number:03}"
        if number >= originals:
            copies[name] = f"adapter-{number - originals:03}"
        random_adapter(model, number % originals, number >= originals).write(folder / "made" / name)
        add(folder / "library", folder / "made" / name, description=f"adapter number {number}")
    return copies


def duplicates(folder: Path) -> set[tuple[str, str]]:
    library = read_library(folder)
    adapters = {name: Adapter.read(library.path(name)) for name in library.entries}
    return {(pair.one, pair.other) for pair in near_duplicates(similarities(adapters), CONFIG["threshold"])}


def timed(action: Any, rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        found.append(round(time.perf_counter() - began, 4))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bytes", action="store_true", help="no times, and no result.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        copies = fill(Path(folder))
        library = Path(folder) / "library"
        assert verify(library) == []
        found = duplicates(library)
        assert found == {(original, copy) for copy, original in copies.items()}, "the copies, and no others"
        size = (library / INDEX).stat().st_size
        tensors = sum(entry.bytes for entry in read_library(library).entries.values())
        figures: dict[str, Any] = {
            "index_bytes": size,
            "index_bytes_per_adapter": round(size / CONFIG["adapters"]),
            "tensor_bytes": tensors,
            "pairs_found": len(found),
        }
        print(figures)
        if args.bytes:
            return
        figures["list_s"] = timed(lambda: read_library(library), CONFIG["rounds"])
        figures["duplicates_s"] = timed(lambda: duplicates(library), CONFIG["rounds"])
        write_result(__file__, {"config": CONFIG, **figures})


if __name__ == "__main__":
    main()
