"""How many of the damaged lines of a file are found, with what reason, and how long it takes to read it."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from machine import write_result  # noqa: E402

from graftlm.data.sources.formats import FORMATS  # noqa: E402
from graftlm.data.sources.load import load_rows  # noqa: E402
from graftlm.data.sources.records import Problem  # noqa: E402
from tests.data.damage import KINDS, NOTED, damaged_file  # noqa: E402
from tests.data.sources.test_damage import CLEAN  # noqa: E402


def read(file: Path) -> tuple[list[int], list[Problem], float]:
    """The lines that became rows, what was reported, and seconds of CPU."""
    problems: list[Problem] = []
    started = time.process_time()
    rows, _ = load_rows(str(file), problems=problems)
    return [_line(row.where) for row in rows], problems, time.process_time() - started


def _line(where: str) -> int:
    return int(where.rpartition(":")[2])


def damaged(folder: Path, config: dict[str, Any], seed: int) -> dict[str, Any]:
    file = folder / "rows.jsonl"
    planted = damaged_file(file, config["rows"], config["damaged"], seed)
    loaded, problems, seconds = read(file)
    right = {_line(p.where) for p in problems if ({**KINDS, **NOTED})[planted[_line(p.where)]][1] in p.reason}
    gone = {n for n, kind in planted.items() if kind in KINDS or kind == "a blank line"}
    return {
        "damaged": len(planted),
        "reported_with_the_right_line_and_reason": len(right),
        "false_alarms": len({_line(p.where) for p in problems} - planted.keys()),
        "of_them_left_out": len(gone),
        "other_rows_loaded": len(set(loaded) - gone),
        "other_rows_lost": config["rows"] - len(gone) - len(loaded),
        "cpu_s": round(seconds, 2),
    }


def clean(folder: Path, name: str, rows: int) -> dict[str, Any]:
    file = folder / "clean.jsonl"
    file.write_text("".join(json.dumps(CLEAN[name](n), ensure_ascii=False) + "\n" for n in range(rows)))
    loaded, problems, seconds = read(file)
    return {"rows": len(loaded), "alarms": len(problems), "cpu_s": round(seconds, 2)}


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        result = {
            "config": config,
            "kinds": {"left out": list(KINDS), "kept and told": list(NOTED)},
            "damaged": {f"seed {seed}": damaged(folder, config, seed) for seed in config["seeds"]},
            "clean": {name: clean(folder, name, config["clean"]) for name in FORMATS},
        }
    write_result(__file__, result)


if __name__ == "__main__":
    main()
