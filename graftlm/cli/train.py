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
    out: Annotated[Path, typer.Option("--out", help="The adapter folder to write.")] = Path("adapter"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder, if there is one.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume with a recipe that is not the one the run began with.")
    ] = False,
) -> None:
    """Train the delta that a recipe describes. Exit codes: 0 done, 75 stopped and ready for --resume, other: error."""
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
