"""The demo, timed as a user sees it: the whole command, with an empty cache, so that converting the base is in it.

The first seed is run twice: the second run must write the same adapter, byte for byte.
"""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm.display.terminal import side_by_side  # noqa: E402


def demo(recipe: str, seed: int, folder: Path, cache: Path) -> dict[str, Any]:
    """One run of the command in a process of its own."""
    command = [sys.executable, "-m", "graftlm", "train", str(ROOT / recipe), f"train.seed={seed}", "--out", str(folder)]
    started = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"GRAFT_CACHE": str(cache)}, stdout=subprocess.DEVNULL)
    wall_s = time.perf_counter() - started
    adapter = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    return {"seed": seed, "command_wall_s": round(wall_s, 1), "adapter_sha256": adapter} | json.loads(
        (folder / "summary.json").read_text()
    )


def draw(held_out: Path, file: Path) -> None:
    """The picture in README: the first held-out functions of at most five lines, as the first run answered them."""
    samples = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    short = [s for s in samples if s["asked"].count("\n") < 5 and len(s["asked"]) < 200][:5]
    for sample in short:
        sample["base"] = sample["base"] if len(sample["base"]) < 160 else sample["base"][:160] + " ..."
    console = Console(record=True, width=132, file=io.StringIO())
    console.print(side_by_side(short))
    svg = re.sub(r"@font-face {.*?}", "", console.export_svg(title="make demo"), flags=re.S)  # fetched from elsewhere
    file.write_text(svg, encoding="utf-8")


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        cache = Path(temporary, "cache")
        for number, seed in enumerate([*config["seeds"], config["seeds"][0]]):
            print(f"seed {seed} ...", flush=True)
            runs.append(demo(config["recipe"], seed, Path(temporary, f"run-{number}"), cache))
        draw(Path(temporary, "run-0", "held_out.jsonl"), ROOT / "docs" / "demo.svg")
    same = runs[0]["adapter_sha256"] == runs[-1]["adapter_sha256"]
    write_result(__file__, {"config": config, "same_bytes_again": same, "runs": runs})


if __name__ == "__main__":
    main()
