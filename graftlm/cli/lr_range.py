"""`graft lr-range`."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm import distributed
from graftlm.cli.options import JsonOption, OverridesArgument, RecipeArgument
from graftlm.cli.terminal import prepare_libraries, print_json


def lr_range(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    html: Annotated[Path, typer.Option("--html", help="HTML page to write.")] = Path("lr-range.html"),
    as_json: JsonOption = False,
) -> None:
    """Run an LR range test on the rows of a recipe.

    It suggests a learning rate and a batch size, and writes a page with the curve. No adapter is written.
    """
    from rich.console import Console

    from graftlm.planning import lr_range
    from graftlm.recipe import read_recipe

    distributed.start()  # before anything can go wrong, so that an error is shown once
    prepare_libraries()
    tree = read_recipe(recipe, overrides or [])
    found = lr_range.lr_range_test(tree, console=Console(stderr=True))
    lr_range.write(html, found, tree, title=f"learning rates: {recipe}")
    if as_json:
        print_json(found)
        return
    for line in (*lr_range.lines(found, tree), f"wrote {html}"):
        print(line)
