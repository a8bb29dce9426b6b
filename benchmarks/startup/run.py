"""How long the command line takes to answer, whether torch was imported, and the way to the first training step."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from machine import write_result  # noqa: E402

IMPORTS = "import sys, graftlm.cli; print('torch' in sys.modules)"


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    graft = shutil.which("graft", path=str(Path(sys.executable).parent)) or "graft"
    seconds = {}
    for command in config["commands"]:
        times = []
        for _ in range(config["runs"]):
            started = time.perf_counter()
            subprocess.run([graft, *command.split()[1:]], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - started)
        seconds[command] = {"median_s": round(statistics.median(times), 3), "max_s": round(max(times), 3)}
    torch = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True).stdout.strip()
    script = [sys.executable, str(HERE / "first_step.py")]
    _stdout_of(script)  # converts the base and renders the rows, if nothing has
    runs = [json.loads(_stdout_of(script).splitlines()[-1]) for _ in range(config["first_step_runs"])]
    stages = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    after_imports = {name: took for name, took in stages.items() if not name.startswith("imports")}
    found = {
        "seconds": seconds,
        "imports_torch": torch == "True",
        "to_the_first_step_s": round(sum(stages.values()), 2),
        "from_loading_to_the_first_step_s": round(sum(after_imports.values()), 2),
        "our_share_of_it_s": round(sum(after_imports[name] for name in config["ours"]), 2),
        "stages_s": stages,
    }
    write_result(__file__, {"config": config, **found})


def _stdout_of(command: list[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
