"""Claim: a run that is killed, starved of disk or damaged at any instant ends in the bytes of one that was not.

    python benchmarks/crash/run.py            what result.json does not hold yet, for each kind of run in config.yaml
    python benchmarks/crash/run.py --quick    a twentieth of it, and writes nothing

Runs are children of this process, forked when everything is imported, so that a life costs a second. A life ends by
SIGKILL at a random instant, at one write, sync, rename or deletion after the other, or by a disk that is full (a tmpfs
of 5 MB, with a ballast of another size each time) or cannot be written; both need root. The next life resumes. When a
run is done, the bytes of its adapter and every loss that it logged are compared with those of the unbroken run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "result.json"
sys.path.insert(0, str(HERE.parent))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import yaml  # noqa: E402
from machine import commit, write_result  # noqa: E402

import graftlm.training.checkpoints as checkpoint  # noqa: E402
from graftlm.config.schema import build  # noqa: E402
from graftlm.errors import GraftError  # noqa: E402
from graftlm.recipe import Recipe  # noqa: E402
from graftlm.run import train  # noqa: E402
from graftlm.system import tune_process  # noqa: E402
from graftlm.testing import save_tiny_base  # noqa: E402

CONFIG = yaml.safe_load((HERE / "config.yaml").read_text())
torch.set_num_threads(1)


def life(recipe: Recipe, out: Path, before: Callable[[], None] = lambda: None, message_file: Path | None = None) -> int:
    """The process number of a child that resumes the run; it exits with 0, or 3 after a GraftError, told in a file."""
    if child := os.fork():
        return child
    message_file = message_file or out.with_suffix(".said")
    try:
        before()
        train(recipe, out, resume=True)
        os._exit(0)
    except GraftError as error:
        message_file.write_text(str(error))
        os._exit(3)
    except BaseException as error:
        message_file.write_text(repr(error))
    finally:  # a child must never come back into the parent's code
        os._exit(4)


def ended(child: int) -> int:
    """Its exit code, minus the signal if one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def same(out: Path, whole: Path) -> bool:
    def losses(folder: Path) -> list[tuple[int, float]]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    name = "adapter_model.safetensors"
    leftovers = [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]
    return (out / name).read_bytes() == (whole / name).read_bytes() and losses(out) == losses(whole) and not leftovers


def dying(at: int) -> Callable[[], None]:
    """In the child: die at operation number `at` of those that change the disk."""

    def prepare() -> None:
        left = at

        def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return called

        os.fsync, os.rename, os.unlink, os.mkdir = map(wrapped, (os.fsync, os.rename, os.unlink, os.mkdir))
        os.replace, shutil.rmtree, shutil.copyfile = map(wrapped, (os.replace, shutil.rmtree, shutil.copyfile))
        Path.write_text = wrapped(Path.write_text)  # type: ignore[method-assign]
        checkpoint.save_file = wrapped(checkpoint.save_file)

    return prepare


def saving(folder: Path) -> int:
    """The step whose checkpoint is being written, 0 if none is."""
    try:
        return max((int(name[6:14]) for name in os.listdir(folder) if name.startswith(".step-")), default=0)
    except FileNotFoundError:
        return 0


def at_random(recipe: Recipe, whole: Path, work: Path, kills: int, inside: int, draw: random.Random) -> dict[str, int]:
    """Kill at random instants until there were enough, those inside a save first; every run goes on to its end."""
    found = {"kills": 0, "inside_a_save": 0, "runs": 0, "other_bytes": 0, "failed": 0}
    for name in ("warm", "measured"):
        started = time.perf_counter()
        assert ended(life(recipe, work / name)) == 0
        takes = 0.7 * (time.perf_counter() - started)
    while found["kills"] < kills:
        out = work / f"random-{found['runs']}"
        for _ in range(12):  # lives of one run
            child = life(recipe, out)
            drafts = out / "checkpoints"
            if found["inside_a_save"] < inside:
                after = draw.randrange(CONFIG["train"]["steps"])
                while os.waitpid(child, os.WNOHANG) == (0, 0):
                    if saving(drafts) > after:
                        break
                else:
                    break
                time.sleep(draw.uniform(0, 0.004))
            else:
                time.sleep(draw.uniform(0, takes))
            in_save = saving(drafts) > 0
            os.kill(child, signal.SIGKILL)
            if ended(child) != -signal.SIGKILL:
                break
            found["kills"] += 1
            found["inside_a_save"] += in_save
        _goes_on(recipe, out, whole, found)
        found["runs"] += 1
        print(found, flush=True)
    return found


def at_every_operation(recipe: Recipe, whole: Path, work: Path, step: int) -> dict[str, int]:
    """Die once at each operation that changes the disk in a run of fewer steps, then go on."""
    recipe, whole = replace(recipe, train=replace(recipe.train, steps=CONFIG["operation_steps"])), work / "short"
    assert ended(life(recipe, whole)) == 0
    found, at = {"operations": 0, "other_bytes": 0, "failed": 0}, 1
    while True:
        out = work / f"operation-{at}"
        if ended(life(recipe, out, dying(at))) != -signal.SIGKILL:
            return found
        found["operations"] += 1
        _goes_on(recipe, out, whole, found)
        at += step


@contextmanager
def disk(place: Path) -> Iterator[None]:
    """A tmpfs of its own at `place`; needs root."""
    place.mkdir()
    size = f"size={CONFIG['disk_mb']}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def on_a_full_disk(recipe: Recipe, whole: Path, work: Path, points: int, draw: random.Random) -> dict[str, int]:
    """Begin with room for some steps, go on when there is room again."""
    found = {"points": 0, "told_path_and_bytes": 0, "leftovers": 0, "other_bytes": 0, "failed": 0}
    place = work / "full"
    with disk(place):
        while found["points"] < points:
            out, ballast = place / "out", place / "ballast"
            free = shutil.disk_usage(place).free
            ballast.write_bytes(b"x" * (free - draw.randrange(0, 400_000)))
            message_file = work / "full.said"  # where there is room
            code = ended(life(recipe, out, message_file=message_file))
            if code == 3:
                found["points"] += 1
                found["told_path_and_bytes"] += (
                    "no room" in message_file.read_text() and "bytes" in message_file.read_text()
                )
                found["leftovers"] += bool(out.exists() and list((out / "checkpoints").glob(".step-*")))
                found["leftovers"] += bool(list(place.glob(".out.*")))
            elif code != 0:
                found["failed"] += 1
            ballast.unlink()
            message_file.unlink(missing_ok=True)
            _goes_on(recipe, out, whole, found)
    return found


def on_a_read_only_disk(recipe: Recipe, whole: Path, work: Path, points: int, draw: random.Random) -> dict[str, int]:
    """Killed, then resumed where nothing can be written, and again where it can."""
    found = {"points": 0, "told_path": 0, "changed": 0, "other_bytes": 0, "failed": 0}
    place = work / "read-only"
    with disk(place):
        while found["points"] < points:
            out = place / "out"
            ended(life(recipe, out, dying(draw.randrange(20, 400))))
            before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            message_file = work / "read-only.said"
            code = ended(life(recipe, out, message_file=message_file))
            subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
            found["points"] += 1
            found["failed"] += code != 3
            found["told_path"] += str(out) in message_file.read_text()
            found["changed"] += before != {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
            _goes_on(recipe, out, whole, found)
    return found


def _goes_on(recipe: Recipe, out: Path, whole: Path, found: dict[str, int]) -> None:
    """To the end, to the bytes of the whole run; counted where it does not."""
    if ended(life(recipe, out)) != 0:
        found["failed"] += 1
        print(out.with_suffix(".said").read_text(), flush=True)
    elif not same(out, whole):
        found["other_bytes"] += 1
    shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    tune_process()
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--quick", action="store_true")
    quick = reader.parse_args().quick
    part = 20 if quick else 1
    before = json.loads(RESULT.read_text()) if RESULT.exists() and not quick else {}
    results: dict[str, Any] = {name: before.get(name, {}) for name in CONFIG["runs"]}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["GRAFT_CACHE"] = str(work / "cache")
        base = save_tiny_base(work / "base")
        rows = work / "rows.jsonl"
        words = ["red", "green", "blue", "seven", "eleven", "one", "two", "apple", "pear", "sky", "sea"]
        rows.write_text(
            "".join(
                json.dumps({"prompt": f"say {words[n % 11]}", "completion": " ".join(words[n % 11 :][: 1 + n % 7])})
                + "\n"
                for n in range(40)
            )
        )
        for name, changes in CONFIG["runs"].items():
            tree = {
                "base": {"name": str(base), "dtype": "float32"},
                "data": {"train": str(rows), "held_out": 2},
                "train": CONFIG["train"],
                "report": {"samples": 1, "answers": 1, "max_new_tokens": 2},
                **changes,
            }
            recipe = build(Recipe, tree, source="config.yaml")
            place = work / name
            place.mkdir()
            whole = place / "whole"
            assert ended(life(recipe, whole)) == 0, whole.with_suffix(".said").read_text()
            draw = random.Random(CONFIG["seed"])
            kills, inside = CONFIG["kills"] // part, CONFIG["inside_a_save"] // part
            points = max(1, CONFIG["disk_points"] // part)
            found = results[name]
            for what, measured in (
                ("full_disk", partial(on_a_full_disk, points=points, draw=draw)),
                ("read_only_disk", partial(on_a_read_only_disk, points=points, draw=draw)),
                ("at_random", partial(at_random, kills=kills, inside=inside, draw=draw)),
                ("at_every_operation", partial(at_every_operation, step=part)),
            ):
                if what in found:
                    continue
                found[what] = measured(recipe, whole, place) | {"commit": commit()}
                print(name, what, found[what], flush=True)
                if not quick:
                    write_result(__file__, {"config": CONFIG, **results})


if __name__ == "__main__":
    main()
