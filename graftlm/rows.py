"""The rows of a recipe, checked: what `graft data check` prints."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from graftlm.config.schema import build
from graftlm.config.source import lay_over
from graftlm.config.trees import Tree
from graftlm.data.quality.report import Report
from graftlm.data.sources.axolotl import is_axolotl
from graftlm.data.sources.source import DataConfig
from graftlm.prepare import Prepared, prepare_data
from graftlm.recipe import Recipe, read_recipe


def rows_report(source: Recipe | DataConfig | str | Path, *, survey: bool = True) -> Report:
    """Check the rows that a recipe trains on, as `graft data check` does.

    `source` is a recipe, its `data` alone, a recipe file (.yaml), or a file of rows, `hub:...` or `builtin:...`. What
    is no recipe is checked with the defaults of one: base smollm2, mask response.

    Returns the Report: (name, value) pairs in `lines()`, everything in `to_json()`; counts are of rows and tokens.
    With `survey`, `report.survey` says what the rows look like (duplicates, overlap with held-out rows, refusals,
    damage), which takes longer than rendering them; without it that is None. Raises RecipeError for a recipe that is
    wrong, DataError where no row can be used, and BaseModelError for a base that is not there.
    """
    return check_rows(as_recipe(source), show=1, survey=survey).report


def check_rows(recipe: Recipe, *, show: int, survey: bool = True, console: Console | None = None) -> Prepared:
    """The rows of a recipe, rendered and checked, with the first `show` token by token; raises as `rows_report`."""
    return prepare_data(recipe, recipe.tokenizer(), show=show, look=survey, console=console)


def as_recipe(source: Recipe | DataConfig | str | Path) -> Recipe:
    """The recipe, that of a recipe file, or one with defaults for these rows; raises RecipeError."""
    if isinstance(source, Recipe):
        return source
    if isinstance(source, DataConfig):
        return Recipe(data=source)
    return read_recipe(source) if is_recipe(source) else recipe_of_rows(str(source))


def recipe_of_rows(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe for rows of this source, with `key=value` strings laid over it; raises RecipeError."""
    tree: Tree = {"data": {"train": source}}
    lay_over(tree, overrides)
    return build(Recipe, tree, source="command line")


def is_recipe(source: str | Path) -> bool:
    """Whether it is a recipe file of ours, and neither a file of rows nor what another trainer describes."""
    return Path(source).suffix in (".yaml", ".yml") and not is_axolotl(str(source))
