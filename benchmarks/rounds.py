"""Two sides that train the same rows from the same adapter, in alternating runs, a process each.

Every run's result is kept in runs/ and not run again, so that the grid can be stopped and resumed; delete runs/ to
start over.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from machine import write_result

from graftlm.adapters.save import save_adapter
from graftlm.deltas.lora import LoraConfig
from graftlm.hub.load import load_base
from graftlm.model.attach import attach

Config = dict[str, Any]
Runs = dict[str, list[dict[str, Any]]]
"""What every round of a shape found, by the shape's name."""


def compare(
    script: str,
    options: Sequence[str],
    write_rows: Callable[[Config, Path], None],
    summarise: Callable[[Runs], dict[str, Any]],
) -> None:
    """Run every shape of the script's config in turn, for each number of threads, and write result.json.

    `options` are the keys of the config that both sides are told.
    """
    here = Path(script).parent
    config = yaml.safe_load((here / "config.yaml").read_text())
    runs = here / "runs"
    runs.mkdir(exist_ok=True)
    write_rows(config, runs / "rows.jsonl")
    write_base(config, runs / "base")
    write_start(config, runs / "start")
    found: dict[int, Runs] = {threads: {} for threads in config["threads"]}

    def run(shapes: Config, threads: int, round_: int) -> None:
        for name, command in shapes.items():
            slug = "".join(c if c.isalnum() else "-" for c in name)
            settings = {key: config[key] for key in options} | {"threads": threads}
            out = runs / f"{slug}-{threads}t-{round_}.json"
            found[threads].setdefault(name, []).append(one_run(here, command, settings, out))

    for threads in config["threads"]:
        for round_ in range(config["rounds"]):
            run(config["shapes"], threads, round_)
    run(config["once"], 1, 0)
    write_result(script, {"config": config, "threads": {str(t): summarise(shapes) for t, shapes in found.items()}})


def one_run(here: Path, command: list[str], settings: dict[str, Any], out: Path) -> dict[str, Any]:
    if not out.is_file():
        print(f"{out.stem} ...", flush=True)
        runs = out.parent
        settings |= {"base": runs / "base", "start": runs / "start", "rows": runs / "rows.jsonl", "out": out}
        flags = [text for key, value in settings.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        script = [sys.executable, str(here / command[0]), *command[1:], *flags]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(script, env=offline, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(script)}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def write_base(config: Config, folder: Path) -> None:
    """The base in bf16, as hubs have it, for both sides: converting a float32 file takes the memory of both."""
    if not folder.is_dir():
        model, tokenizer = load_base(config["base"], dtype="bfloat16")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def write_start(config: Config, folder: Path) -> None:
    """The fresh adapter, in PEFT's files, that both sides train: so that losses can be compared step by step."""
    if not folder.is_dir():
        model = load_base(config["base"], dtype="bfloat16").model
        attach(model, LoraConfig(r=16, alpha=32), seed=config["seed"])
        save_adapter(model, folder)
