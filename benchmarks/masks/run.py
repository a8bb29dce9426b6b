"""Random conversations for each shape of template: what is trained is the answers and their ends, to the character.

The property is that of chat/test_render.py, with many more conversations. Every template's run is kept in runs/;
delete it to start over.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT)]

from machine import write_result  # noqa: E402

from tests.data.shapes import SHAPES  # noqa: E402


def one(name: str, conversations: int) -> dict[str, Any]:
    file = HERE / "runs" / f"{name}.json"
    if not file.is_file():
        test = f"tests/data/chat/test_render.py::test_random_conversations_hold_every_promise[{name}]"
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--no-header", test],
            cwd=ROOT,
            env=os.environ | {"CONVERSATIONS": str(conversations), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        took = time.perf_counter() - started
        file.parent.mkdir(exist_ok=True)
        output = "" if done.returncode == 0 else done.stdout[-2000:]
        file.write_text(json.dumps({"holds": done.returncode == 0, "said": output, "wall_s": round(took, 1)}) + "\n")
    found: dict[str, Any] = json.loads(file.read_text())
    print(name, found, flush=True)
    return found


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    found = {name: one(name, config["conversations"]) for name in SHAPES}
    write_result(
        __file__, {"config": config, "templates": found, "hold": all(each["holds"] for each in found.values())}
    )


if __name__ == "__main__":
    main()
