"""Every class of causal language models in transformers against everything that an adapter goes through.

python benchmarks/architectures/run.py            all classes, each once: what runs/ has already is not run again
python benchmarks/architectures/run.py llama gpt2 these, anew
python benchmarks/architectures/run.py --result   no run: result.json of what runs/ has

The models are tiny and random (tests/architectures.py says how each is made). Each class is a process of its own, with
a limit of time: one that is killed is a crash in every column.
"""

import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1")
HERE = Path(__file__).parent
RUNS = HERE / "runs"
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import torch  # noqa: E402
import transformers  # noqa: E402
from machine import write_result  # noqa: E402

from tests.architectures import COLUMNS, NAMES, NOT_BUILT, answer  # noqa: E402

LIMIT_S = 180
REASON = 240
"""Characters of a reason in result.json; runs/ has them whole."""


def one(name: str) -> None:
    """All columns of one class; a file as soon as all are there."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name, "transformers": transformers.__version__}
    row["cells"] = {column: answer(column, name) for column in COLUMNS}
    (RUNS / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")


def run(name: str) -> None:
    began = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=one, args=(name,))
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        process.join()
    if not (RUNS / f"{name}.json").is_file():
        why = f"the process ended with {process.exitcode} after {time.monotonic() - began:.0f} s"
        cells = {column: {"verdict": "crash", "says": why} for column in COLUMNS}
        (RUNS / f"{name}.json").write_text(json.dumps({"name": name, "cells": cells}, indent=1) + "\n")
    verdicts = Counter(cell["verdict"] for cell in json.loads((RUNS / f"{name}.json").read_text())["cells"].values())
    print(f"{name:24} {time.monotonic() - began:5.1f} s  {dict(verdicts)}", flush=True)


def main(arguments: list[str]) -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    RUNS.mkdir(exist_ok=True)
    if arguments != ["--result"]:
        for name in arguments or NAMES:
            if arguments:
                (RUNS / f"{name}.json").unlink(missing_ok=True)
            if not (RUNS / f"{name}.json").is_file():
                run(name)
    found = {name: json.loads(file.read_text())["cells"] for name in NAMES if (file := RUNS / f"{name}.json").is_file()}
    for cells in found.values():
        for cell in cells.values():
            cell["says"] = cell["says"][:REASON]
    verdicts = {
        column: dict(sorted(Counter(cells[column]["verdict"] for cells in found.values()).items()))
        for column in COLUMNS
    }
    write_result(__file__, {"classes": len(found), "not_built": NOT_BUILT, "verdicts": verdicts, "cells": found})


if __name__ == "__main__":
    main(sys.argv[1:])
