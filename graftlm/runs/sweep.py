"""`graft sweep`: a grid of values laid over a recipe, a run for each point, each in a process and a folder of its own.

    OUT/recipes/NAME.yaml     the recipe of a point, whole, as it was when the sweep began
    OUT/logs/NAME.log         the output of its process
    OUT/NAME/                 its run

The same command resumes the sweep: finished runs are skipped, an unfinished one is resumed. A run that fails is
reported, and the others go on.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any
from zlib import crc32

import graftlm
from graftlm.config.aliases import OTHER_NAMES
from graftlm.config.schema import to_tree, to_yaml
from graftlm.config.source import parse_yaml
from graftlm.config.trees import differences
from graftlm.errors import OutputError, RecipeError, TrainingError, nearest, numbered
from graftlm.files import writing
from graftlm.lock import only_writer
from graftlm.recipe import Recipe, read_recipe
from graftlm.run import RESUMABLE, stop_on_signal
from graftlm.runs.compare import compare, short_names
from graftlm.training.run_folder import matters

TAGS = ("method", "name", "by")
"""Keys whose value says which config a mapping is: `lora.r` is then another word for `delta.r`."""


@dataclass(frozen=True)
class Point:
    name: str
    """The name of its folder: the values by which it differs from the others."""
    recipe: Recipe


@dataclass
class Outcome:
    """The points by result; those in no list were not started."""

    skipped: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name -> the error in its log."""


# The grid --------------------------------------------------------------------------------------------------------


def grid(path: str | Path, settings: Sequence[str]) -> list[Point]:
    """Every combination of the values of `key=v1,v2` and `key=a..b` over the recipe there; the last key changes first.

    A key may be the end of a recipe's key, if of one only. Raises RecipeError for every point that is no recipe.
    """
    tree = to_tree(read_recipe(path))
    axes: dict[str, list[str]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise RecipeError(
                f"{setting!r}: write what to vary as key=value,value or key=first..last", code="malformed-override"
            )
        full = resolve(key, tree)
        if full in axes:
            raise RecipeError(f"{setting!r}: {full} was already given", code="repeated-key")
        axes[full] = values_of(setting, text)
    recipe_tree, _ = parse_yaml(Path(path).read_text(encoding="utf-8-sig"), str(path))
    kinds = {kind: value for key in axes for kind, value in _config_tags(key, tree, recipe_tree) if kind not in axes}
    varied = [key for key, values in axes.items() if len(values) > 1] or list(axes)
    names = short_names(varied)
    points, problems = [], []
    for values in product(*axes.values()):
        point_values = dict(zip(axes, values, strict=True))
        overrides = [f"{key}={value}" for key, value in (kinds | point_values).items()]
        name = ",".join(f"{names[key]}={_file_name(point_values[key])}" for key in varied) or "run"
        try:
            points.append(Point(name, read_recipe(path, overrides)))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)), code="unusable-points")
    return points


def _config_tags(key: str, tree: Any, recipe_tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, value) of defaults to write out, so that `delta.r=4` means something where the recipe has no `delta`."""
    parents: list[str] = []
    own: Any = recipe_tree
    for part in key.split(".")[:-1]:
        parents.append(part)
        tree, own = _child(tree, part), _child(own, part)
        for tag in TAGS:
            if own is None and isinstance(tree, Mapping) and tag in tree:
                yield ".".join((*parents, tag)), str(tree[tag])
        if not isinstance(tree, Mapping):
            return


def _child(tree: Any, part: str) -> Any:
    """What stands in a mapping under this key, or in a list at this number; None where nothing does."""
    if isinstance(tree, Mapping):
        return tree.get(part)
    return tree[int(part)] if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree) else None


def values_of(setting: str, text: str) -> list[str]:
    """The values of one key, each as it would stand behind `key=`: ranges of whole numbers are counted out."""
    values: list[str] = []
    for part in _split(text):
        if (ends := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", part)) is not None:
            first, last = int(ends[1]), int(ends[2])
            if last < first:
                raise RecipeError(
                    f"{setting!r}: the range {part} is empty: write the smaller number first", code="invalid-range"
                )
            values += map(str, range(first, last + 1))
        elif ".." in part and re.fullmatch(r"[-+.\deE]+", part):
            raise RecipeError(
                f"{setting!r}: {part} is no range: both ends must be whole numbers. Else list the values",
                code="invalid-range",
            )
        else:
            values.append(part)
    if len(set(values)) < len(values):
        raise RecipeError(f"{setting!r}: {max(values, key=values.count)} is listed twice", code="repeated-value")
    return values


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket and in no quotation marks."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if character == "," and not depth and not quote:
            parts.append("")
            continue
        if character in "\"'":
            quote = "" if character == quote else quote or character
        elif not quote:
            depth += (character in "[{") - (character in "]}")
        parts[-1] += character
    return [part.strip() for part in parts]


def resolve(key: str, tree: Mapping[str, Any]) -> str:
    """The one dotted key of a recipe that is `key` or ends so. Raises RecipeError where there is none, or several."""
    spellings = list(_spellings(tree))
    if any(real == key for _, real in spellings):
        return key
    found = sorted({real for spelling, real in spellings if spelling == key or spelling.endswith(f".{key}")})
    if len(found) == 1:
        return found[0]
    if found:
        raise RecipeError(
            f"{key}: this is ambiguous: {' or '.join(found)}. Write more of the key", code="ambiguous-key"
        )
    if key.split(".")[0] in {each.name for each in fields(Recipe)}:
        return key  # the recipe has no such section yet; reading it finds mistakes
    if (other := OTHER_NAMES.get(key.rpartition(".")[2])) is not None:
        raise RecipeError(f"{key}: no key of the recipe ends so. Here it is {other}", code="unknown-key")
    ends = {".".join(spelling.split(".")[n:]) for spelling, _ in spellings for n in range(spelling.count(".") + 1)}
    raise RecipeError(f"{key}: no key of the recipe ends so. {nearest(key, ends)}", code="unknown-key")


def _spellings(tree: Mapping[str, Any], prefix: Sequence[str] = (), real: str = "") -> Iterator[tuple[str, str]]:
    """(how it may be written, what it is) for every key of a recipe and for what is inside."""
    for key, value in tree.items():
        if "." in key:  # a pattern for names, which no bare key can say
            continue
        if isinstance(value, list):
            value = {str(number): each for number, each in enumerate(value)}
        here = f"{real}.{key}" if real else key
        tag = next((str(value[t]) for t in TAGS if t in value), None) if isinstance(value, Mapping) else None
        for word in {key, tag or key}:
            yield ".".join((*prefix, word)), here
            if isinstance(value, Mapping):
                yield from _spellings(value, (*prefix, word), here)


def _file_name(text: str) -> str:
    """A value as a part of a folder's name; one that cannot stand there as it is ends in a number made of it."""
    clean = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-.")[:40]
    return clean if clean == text else f"{clean}-{crc32(text.encode()):08x}"


# The runs --------------------------------------------------------------------------------------------------------


def sweep(points: Sequence[Point], out: Path, *, on: str = "local", say: Callable[[str], None] = print) -> Outcome:
    """Run what is not finished, one after another or on Ray; Ctrl-C stops the run at hand so that it can be resumed.

    Raises OutputError where a folder holds a run of another recipe, and where another sweep writes to `out`.
    """
    if on not in RUNNERS:
        raise RecipeError(f"--on {on}: unknown value. {nearest(on, RUNNERS)}", code="invalid-value")
    with only_writer(out, say=say):
        return _sweep(points, out, on, say)


def _sweep(points: Sequence[Point], out: Path, on: str, say: Callable[[str], None]) -> Outcome:
    outcome = Outcome()
    todo = []
    for point in points:
        if _is_finished(out / point.name, point.recipe):
            outcome.skipped.append(point.name)
        else:
            todo.append(point)
    with writing(out):
        for folder in ("recipes", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        for point in todo:
            _recipe_file(out, point).write_text(to_yaml(point.recipe), encoding="utf-8")
    if outcome.skipped:
        say(f"{len(outcome.skipped)} of {len(points)} runs are finished already")

    def on_end(point: Point, code: int) -> None:
        number = len(points) - len(todo) + len(outcome.done) + len(outcome.stopped) + len(outcome.failed) + 1
        if code == 0:
            outcome.done.append(point.name)
        elif code == RESUMABLE:
            outcome.stopped.append(point.name)
        else:
            outcome.failed[point.name] = _error_in(_log_file(out, point)) or _exit_text(code)
        texts = {0: "done", RESUMABLE: "stopped; run the same command again to resume it"}
        say(f"{number}/{len(points)} {point.name}: {texts.get(code, f'FAILED with code {code}')}")

    with stop_on_signal() as stopping:
        RUNNERS[on](todo, out, on_end, lambda: stopping.requested)
    return outcome


def _is_finished(folder: Path, recipe: Recipe) -> bool:
    found = compare([folder]).runs if folder.is_dir() else []
    if not found:  # of one that cannot be read, its process will say what is wrong
        return False
    if changes := [change for change in differences(found[0].recipe, to_tree(recipe)) if matters(change)]:
        raise OutputError(
            f"{folder} holds a run of another recipe:\n{numbered(changes)}\nChoose another --out, or remove it",
            code="other-recipe",
        )
    return found[0].status == "finished"


def _recipe_file(out: Path, point: Point) -> Path:
    return out / "recipes" / f"{point.name}.yaml"


def _log_file(out: Path, point: Point) -> Path:
    return out / "logs" / f"{point.name}.log"


def _error_in(file: Path) -> str:
    """The last line that names an error, or the last line."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    error_lines = [line for line in lines if re.match(r"error\[|[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (error_lines or lines or [""])[-1]


def _exit_text(code: int) -> str:
    return f"its process was ended by signal {signal.Signals(-code).name}" if code < 0 else "its log is empty"


OnEnd = Callable[[Point, int], None]


def _run_locally(todo: Sequence[Point], out: Path, on_end: OnEnd, stop: Callable[[], bool]) -> None:
    for point in todo:
        on_end(point, run_one(_recipe_file(out, point), out / point.name, _log_file(out, point), stop=stop))
        if stop():
            return


def _run_on_ray(todo: Sequence[Point], out: Path, on_end: OnEnd, stop: Callable[[], bool]) -> None:
    """A task for each run: `train.threads` cores, one by default, and a GPU where the cluster has some.

    OUT must be a folder that all its machines see by this name, and graftlm be installed there.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise TrainingError(
            "--on ray: not installed here: pip install 'graftlm[ray]'", code="missing-package"
        ) from None
    try:
        ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False)
    except ConnectionError:
        raise TrainingError(
            "--on ray: no cluster is running: `ray start --head`, or leave out --on", code="no-ray-cluster"
        ) from None
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    running = {}
    for point in todo:
        task = ray.remote(run_one).options(num_cpus=point.recipe.train.threads or 1, num_gpus=gpus, max_retries=0)
        paths = (_recipe_file(out, point), out / point.name, _log_file(out, point))
        running[task.remote(*(path.absolute() for path in paths), cwd=os.getcwd())] = point
    cancelled = False
    while running:
        if stop() and not cancelled:
            cancelled = True
            for each in running:
                ray.cancel(each, force=False)
        ready, _ = ray.wait(list(running), num_returns=1, timeout=0.5)
        for each in ready:
            point = running.pop(each)
            try:
                on_end(point, ray.get(each))
            except ray.exceptions.TaskCancelledError:  # before it had begun
                continue
            except ray.exceptions.RayError as error:
                with open(_log_file(out, point), "a", encoding="utf-8") as log:
                    log.write(f"{error}\n")
                on_end(point, 1)


RUNNERS: dict[str, Callable[[Sequence[Point], Path, OnEnd, Callable[[], bool]], None]] = {
    "local": _run_locally,
    "ray": _run_on_ray,
}


def run_one(
    recipe: Path, folder: Path, log: Path, *, stop: Callable[[], bool] = lambda: False, cwd: str | None = None
) -> int:
    """Train in a process of its own and return its exit code. Where `stop` becomes true, or at a first Ctrl-C, it is
    asked to save and stop; a second one ends it at once."""
    command = [sys.executable, "-m", "graftlm", "train", str(recipe), "--out", str(folder), "--resume"]
    package = str(Path(graftlm.__file__).parent.parent)
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log, "ab") as output:
        child = subprocess.Popen(  # noqa: S603 (ourselves; in a session of its own, else it had each Ctrl-C twice)
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": paths},
            cwd=cwd,
            start_new_session=True,
        )
    requested = False
    while True:
        try:
            if stop() and not requested:
                requested = True
                child.terminate()
            return child.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:
            if requested:
                child.kill()
                child.wait()
                raise
            requested = True
            child.terminate()
