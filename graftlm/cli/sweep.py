"""`graft sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.options import JsonOption, RecipeArgument, ReverseOption, SortOption, TableOption, check_choice
from graftlm.cli.runs import show_runs
from graftlm.cli.terminal import note


def sweep(
    recipe: RecipeArgument,
    grid: Annotated[
        list[str],
        typer.Argument(
            metavar="key=VALUES...",
            help="What to vary: lora.r=4,16,64 or seed=0..2. The end of a recipe's key will do, if it is of one only.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder for the runs; the same again goes on.")] = Path(
        "sweep"
    ),
    on: Annotated[str, typer.Option("--on", help="local: one after another; ray: on the cluster that is running.")] = (
        "local"
    ),
    sort: SortOption = None,
    reverse: ReverseOption = False,
    as_json: JsonOption = False,
    html: TableOption = None,
) -> None:
    """Train a recipe with every combination of some values, and compare the runs."""
    from graftlm.run import RESUMABLE
    from graftlm.runs import sweep as sweeping
    from graftlm.runs.compare import compare

    check_choice(on, sweeping.PLACES, "--on")
    points = sweeping.grid(recipe, grid)
    outcome = sweeping.sweep(points, out, on=on, say=lambda line: note(line))
    made = [out / point.name for point in points if (out / point.name).is_dir()]
    show_runs(compare(made), sort, reverse, as_json, html, failed=outcome.failed)
    for name, why in outcome.failed.items():
        typer.secho(f"{name} FAILED: {why}\n  all of it: {out / 'logs' / name}.log", fg="red", err=True)
    if outcome.failed:
        raise typer.Exit(1)
    if len(outcome.skipped) + len(outcome.done) < len(points):
        note("stopped: the same command goes on")
        raise typer.Exit(RESUMABLE)
