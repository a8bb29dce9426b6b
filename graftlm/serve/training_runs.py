"""GET /runs and /runs/NAME: the runs of a folder, to look at. Nothing is written, and no path of the server is told."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response

from graftlm.display.pages import smoothed
from graftlm.errors import nearest
from graftlm.runs.compare import FIGURES, Run, RunTable, compare
from graftlm.serve.errors import ApiError

POINTS = 1_000
"""Of a curve: more are thinned out, after they are smoothed."""


def gets(folder: Path | None) -> dict[str, Callable[..., Any]]:
    """Path -> what answers it, over the runs in and below a folder. They are read anew for each request. No folder:
    "runs" is null, as a page that asks can know no better."""
    if folder is None:
        return {"/runs": no_runs}

    # Not async: these read files, so they run in a thread.
    def every() -> Response:
        return JSONResponse(finite(listed(compare([folder]), folder)))

    def one(name: str) -> Response:
        found = {name_of(run.folder, folder): run for run in compare([folder]).runs}
        if name not in found:  # a name is looked up, and never made a path
            raise ApiError(404, f"no run {name!r:.200}. {nearest(name, found)}", code="run_not_found")
        return JSONResponse(finite(detail(found[name], folder)))

    return {"/runs": every, "/runs/{name:path}": one}


async def no_runs() -> Response:
    return JSONResponse({"runs": None, "differ": [], "damaged": {}})


def name_of(run: Path, folder: Path) -> str:
    """The folder of a run as seen from the folder of runs."""
    inside = run.relative_to(folder).as_posix()
    return folder.resolve().name if inside == "." else inside


def listed(found: RunTable, folder: Path) -> dict[str, Any]:
    """{"runs": [{name, status, what differs, figures}], "differ": [dotted keys], "damaged": {name: why}}"""
    rows = zip(found.runs, found.rows(), strict=True)
    damaged = {
        name_of(Path(at), folder): why.replace(f"{folder}/", "").replace(f"{folder.resolve()}/", "")
        for at, why in found.damaged.items()
    }
    return {
        "runs": [{"name": name_of(run.folder, folder), **row, "run": None} for run, row in rows],
        "differ": found.differ,
        "damaged": damaged,
    }


def detail(run: Run, folder: Path) -> dict[str, Any]:
    """{name, status, recipe by dotted keys, figures, held_out of summary.json, curve}"""
    return {
        "name": name_of(run.folder, folder),
        "status": run.status,
        "recipe": dict(run.recipe),
        "figures": {name: figure(run) for name, figure in FIGURES.items()},
        "held_out": run.value("held_out"),
        "curve": curve(run.steps),
    }


def curve(steps: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """[step, loss, smoothed loss] of steps at even distances, the first and the last among them; nats per token."""
    known = [(step["step"], step["loss"]) for step in steps if math.isfinite(step["loss"])]
    means = smoothed([loss for _, loss in known])
    last, shown = len(known) - 1, min(len(known), POINTS)
    places = [round(i * last / (shown - 1)) for i in range(shown)] if shown > 1 else range(shown)
    return [[*known[i], means[i]] for i in places]


def finite(tree: Any) -> Any:
    """The tree with None for numbers that JSON does not have."""
    if isinstance(tree, Mapping):
        return {str(key): finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree if isinstance(tree, str | int | float | None) else str(tree)
