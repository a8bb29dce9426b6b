"""`graft train`."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm import distributed
from graftlm.cli.options import OverridesArgument, RecipeArgument
from graftlm.cli.terminal import prepare_libraries


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option("--out", help="Adapter folder to write.")] = Path("adapter"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint in the folder, if there is one.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume although the recipe has changed since the run started.")
    ] = False,
) -> None:
    """Train the adapter that a recipe describes.

    Exit codes: 0 success, 1 error, 2 wrong usage, 75 stopped (resume with --resume), 130 interrupted.
    """
    from rich.console import Console

    from graftlm.recipe import read_recipe
    from graftlm.run import RESUMABLE
    from graftlm.run import train as run

    distributed.start()  # before anything can go wrong, so that an error is shown once
    prepare_libraries()
    result = run(
        read_recipe(recipe, overrides or []),
        out,
        overwrite=overwrite,
        resume=resume,
        accept_changes=accept_changes,
        console=Console(),
    )
    if result.summary.get("interrupted"):
        raise typer.Exit(RESUMABLE)
