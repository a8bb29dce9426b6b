"""How far the held-out loss falls with every optimizer and callback at its defaults, in a short run of the demo's job.

    python benchmarks/defaults/run.py            all of them, then result.json; resumes
    python benchmarks/defaults/run.py sm3 lomo   only these

A run is a process; its result stays in runs/ and is not run again. Nothing is timed: other work may run beside it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

from graftlm.callbacks import CALLBACKS  # noqa: E402
from graftlm.optim import OPTIMIZERS  # noqa: E402

RUNS = HERE / "runs"
CONFIG: dict[str, Any] = yaml.safe_load((HERE / "config.yaml").read_text())


def tree(name: str, seed: int) -> dict[str, Any]:
    """The recipe of an optimizer or a callback, or of AdamW alone with a method: `adamw METHOD STEPS`."""
    alone, steps = name.split()[1:] if name.startswith("adamw ") else (None, None)
    more = {"train": {"steps": int(steps)}} if steps else CONFIG["more"].get(name, {})
    own: dict[str, Any] = {} if alone else {"optimizer": name} if name in OPTIMIZERS else {"callbacks": [name]}
    return {
        "base": CONFIG["base"],
        "data": CONFIG["data"] | more.get("data", {}),
        "delta": {"method": alone or method(name)},
        **own,
        "train": CONFIG["train"] | {"seed": seed} | more.get("train", {}),
        "report": {"samples": 0, "answers": 0},
    }


def reference(name: str) -> str:
    """AdamW over as many steps, with all parameters or with LoRA."""
    steps = (CONFIG["train"] | CONFIG["more"].get(name, {}).get("train", {}))["steps"]
    return f"adamw {'full' if method(name) == 'full' else 'lora'} {steps}"


def method(name: str) -> str:
    return "full" if name in CONFIG["full"] else CONFIG["methods"].get(name, "lora")


def one(name: str, seed: int) -> dict[str, float]:
    """Held-out loss in nats a token before and after."""
    file = RUNS / f"{name.replace(' ', '-')}-{seed}.json"
    if not file.is_file():
        print(f"{name}, seed {seed} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            recipe, out = Path(folder, "recipe.yaml"), Path(folder, "out")
            recipe.write_text(yaml.safe_dump(tree(name, seed)))
            graft = [sys.executable, "-m", "graftlm", "train", str(recipe), "--out", str(out)]
            done = subprocess.run(graft, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}: {(done.stderr or done.stdout)[-2000:]}")
            found = json.loads((out / "summary.json").read_text())["held_out"]["loss_nats"]
        file.write_text(json.dumps(found) + "\n")
    result: dict[str, float] = json.loads(file.read_text())
    return result


def falls(name: str) -> list[float]:
    return [found["base"] - found["tuned"] for found in (one(name, seed) for seed in CONFIG["seeds"])]


def main() -> None:
    RUNS.mkdir(exist_ok=True)
    table: dict[str, dict[str, Any]] = {}
    names = sys.argv[1:] or [*(name for name in OPTIMIZERS if name != "adamw"), *CALLBACKS]
    for seed in CONFIG["seeds"]:  # all names first: a grid that is stopped says something of each
        for name in [*names, *dict.fromkeys(map(reference, names))]:
            one(name, seed)
    for name in names:
        fall, against = falls(name), reference(name)
        share = statistics.mean(fall) / statistics.mean(falls(against))
        table[name] = {
            "method": method(name),
            "fall_nats": [round(each, 3) for each in fall],
            "against": against,
            "of_its_fall": round(share, 2),
            "met": share >= CONFIG["least"],
        }
        print(name, table[name], flush=True)
    if not sys.argv[1:]:
        references = {name: [round(each, 3) for each in falls(name)] for name in dict.fromkeys(map(reference, names))}
        write_result(__file__, {"config": CONFIG, "references": references, "table": table})


if __name__ == "__main__":
    main()
