"""`graft train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftlm import distributed
from graftlm.cli.options import OverridesArgument
from graftlm.cli.terminal import prepare_libraries, print_json

if TYPE_CHECKING:
    from graftlm.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: see docs/recipe.md.")],
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option("--out", help="The adapter folder to write.")] = Path("adapter"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder, if there is one.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume with a recipe that is not the one the run began with.")
    ] = False,
    probe_lr: Annotated[
        bool,
        typer.Option("--probe-lr", help="Train nothing: try learning rates, and say how many rows a step is worth."),
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="With --probe-lr: the page to write; default probe-lr.html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --probe-lr: print JSON, for scripts.")] = False,
) -> None:
    """Train the delta that a recipe describes. Exit codes: 0 done, 75 stopped and ready for --resume, other: error."""
    from rich.console import Console

    from graftlm.recipe import read_recipe
    from graftlm.run import RESUMABLE
    from graftlm.run import train as run

    distributed.start()  # before anything can go wrong, so that it is said once
    prepare_libraries()
    if probe_lr:
        _probe(read_recipe(recipe, overrides or []), html or Path("probe-lr.html"), as_json, title=str(recipe))
        return
    if html or as_json:
        raise typer.BadParameter("this belongs to --probe-lr", param_hint="--html" if html else "--json")
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


def _probe(recipe: "Recipe", page: Path, as_json: bool, title: str) -> None:
    from rich.console import Console

    from graftlm.planning import lr_range

    found = lr_range.probe(recipe, console=Console(stderr=True))
    lr_range.write(page, found, recipe, title=f"learning rates: {title}")
    if as_json:
        print_json(found)
    else:
        for line in (*lr_range.lines(found, recipe), f"wrote {page}"):
            print(line)
