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
            metavar="key=VALUES",
            help="Values to combine, e.g. lora.r=4,16,64 or seed=0..2. Keys may be shortened to an unambiguous suffix.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the runs. Run the same command again to resume the sweep.")
    ] = Path("sweep"),
    on: Annotated[str, typer.Option("--on", help="local: one run after another; ray: on a running Ray cluster.")] = (
        "local"
    ),
    sort: SortOption = None,
    reverse: ReverseOption = False,
    as_json: JsonOption = False,
    html: TableOption = None,
) -> None:
    """Train a recipe with all combinations of values and compare the runs."""
    from graftlm.run import RESUMABLE
    from graftlm.runs import sweep as sweeping
    from graftlm.runs.compare import compare

    check_choice(on, sweeping.RUNNERS, "--on")
    points = sweeping.grid(recipe, grid)
    outcome = sweeping.sweep(points, out, on=on, say=lambda line: note(line))
    run_folders = [out / point.name for point in points if (out / point.name).is_dir()]
    show_runs(compare(run_folders), sort, reverse, as_json, html, failed=outcome.failed)
    for name, why in outcome.failed.items():
        typer.secho(f"{name} FAILED: {why}\n  full log: {out / 'logs' / name}.log", fg="red", err=True)
    if outcome.failed:
        raise typer.Exit(1)
    if len(outcome.skipped) + len(outcome.done) < len(points):
        note("stopped: run the same command again to resume the sweep")
        raise typer.Exit(RESUMABLE)
