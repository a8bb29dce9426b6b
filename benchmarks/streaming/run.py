"""The memory of a stream of short rows from a file: ours, and that of the processes below us.

    python benchmarks/streaming/run.py            all rows; half an hour of one core
    python benchmarks/streaming/run.py --table    result.json from the marks of a run that was left early

What is known before the first row (libraries, a tokenizer) is the start; all that is above it later counts, and so does
all of the processes that were started since. Marks are kept in runs/marks.jsonl as the run goes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import peak_rss_gib, write_result  # noqa: E402

from graftlm.data.chat.render import Renderer  # noqa: E402
from graftlm.data.sources.source import DataConfig, SourceConfig  # noqa: E402
from graftlm.data.sources.streaming import Examples, Stream  # noqa: E402
from graftlm.hub.tokenizer import load_tokenizer  # noqa: E402

CONFIG = yaml.safe_load((HERE / "config.yaml").read_text())
MARKS = HERE / "runs" / "marks.jsonl"


def write_rows(count: int, file: Path) -> None:
    with file.open("w", encoding="utf-8") as out:
        for i in range(count):
            prompt, completion = f"What is the next number after {i}?", f"After {i} comes {i + 1}."
            out.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def peaks_mib(process: int) -> dict[int, float]:
    """The most memory that each process below this one had resident."""
    parents, peaks = dict[int, int](), dict[int, float]()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            except OSError:  # it has ended
                continue
            parents[int(folder.name)] = int(status["PPid"])
            peaks[int(folder.name)] = int(status.get("VmHWM", "0 kB").split()[0]) / 2**10
    family = {process}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return {child: peaks[child] for child in family - {process}}


def stream(file: Path) -> None:
    MARKS.parent.mkdir(exist_ok=True)
    renderer = Renderer(load_tokenizer(CONFIG["base"]))
    source = SourceConfig(path=str(file))
    before, began, cpu_s = 2**10 * peak_rss_gib(), time.perf_counter(), time.process_time()
    rows = Stream([source], seed=0)
    examples = Examples(rows, renderer, DataConfig(train=str(file)), workers=CONFIG["processes"])
    with MARKS.open("w") as out:
        for count, _ in enumerate(examples, start=1):
            if count % CONFIG["mark_every"] == 0 or count == CONFIG["rows"]:
                mark: dict[str, Any] = {
                    "rows": count,
                    "own_above_start_mib": round(2**10 * peak_rss_gib() - before, 1),
                    "children_mib": round(sum(peaks_mib(os.getpid()).values()), 1),
                    "wall_s": round(time.perf_counter() - began, 1),
                    "cpu_s": round(time.process_time() - cpu_s, 1),
                }
                print(mark, flush=True)
                out.write(json.dumps(mark) + "\n")
                out.flush()
            if count == CONFIG["rows"]:
                return


def table() -> None:
    marks = [json.loads(line) for line in MARKS.read_text().splitlines()]
    most = max(mark["own_above_start_mib"] + mark["children_mib"] for mark in marks)
    rows = marks[-1]["rows"]
    found = {"rows": rows, "most_above_start_mib": round(most, 1), "holds": rows == CONFIG["rows"] and most < 1024}
    write_result(__file__, {"config": CONFIG, **found, "marks": [marks[0], *marks[3::4]]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rows.jsonl")
            write_rows(CONFIG["rows"], file)
            stream(file)
    table()


if __name__ == "__main__":
    main()
