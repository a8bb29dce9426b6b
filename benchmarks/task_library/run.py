"""An adapter for each task of `builtin:tasks`, and how many held-out rows it answers exactly.

    python benchmarks/task_library/run.py            all of them, then result.json; resumes
    python benchmarks/task_library/run.py sql add    only these

A training is a process. Its adapter stays in $GRAFT_CACHE/task-adapters/NAME, what was measured in runs/NAME.json; a
task that has both is not trained again. Nothing is timed: other work may run beside it.
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402
from task_adapters import TRAINING, folder_of, source, trained  # noqa: E402

from graftlm.data.sources.load import load_rows  # noqa: E402
from graftlm.data.sources.tasks.table import TASKS  # noqa: E402
from graftlm.evaluation.statistics.intervals import difference_interval  # noqa: E402
from graftlm.evaluation.statistics.significance import holm, mcnemar  # noqa: E402
from graftlm.evaluation.tasks import score  # noqa: E402

RUNS = HERE / "runs"
SIDES = ("base", "tuned")


def one(name: str) -> dict[str, Any]:
    """Held-out loss in nats a token, and for each held-out row its template and whether it was answered exactly."""
    file = RUNS / f"{name}.json"
    if not file.is_file() or not (folder_of(name) / "summary.json").is_file():
        print(f"{name} ...", flush=True)
        out = trained(name)
        rows = {row.where: row for row in load_rows(source(name))[0]}
        held_out = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
        found = {
            "loss_nats": json.loads((out / "summary.json").read_text())["held_out"]["loss_nats"],
            "score": {side: [score(rows[each["where"]], each[side]) for each in held_out] for side in SIDES},
            "groups": [rows[each["where"]].group for each in held_out],
        }
        file.write_text(json.dumps(found) + "\n")
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def main() -> None:
    RUNS.mkdir(exist_ok=True)
    names = sys.argv[1:] or list(TASKS)
    table: dict[str, dict[str, Any]] = {}
    for name in names:
        found = one(name)
        base, tuned = (found["score"][side] for side in SIDES)
        gain = difference_interval(tuned, base, found["groups"])
        table[name] = {
            "loss_nats": {side: round(found["loss_nats"][side], 3) for side in SIDES},
            "exact": {"base": int(sum(base)), "tuned": int(sum(tuned)), "rows": gain.n},
            "gain_95": [round(end, 3) for end in (gain.low, gain.high)],
            "p": mcnemar(tuned, base).p,
        }
        print(name, table[name], flush=True)
    for name, p in zip(names, holm([table[name]["p"] for name in names]), strict=True):
        table[name]["p_holm"] = p
    if not sys.argv[1:]:
        write_result(__file__, {"config": TRAINING, "table": table})


if __name__ == "__main__":
    main()
