"""`graft data check`, `graft data select` and `graft data convert`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm.cli.options import JsonOption, NetworkOption, OverridesArgument, check_choice
from graftlm.cli.terminal import note, prepare_libraries, warn
from graftlm.errors import nearest

if TYPE_CHECKING:
    from graftlm.recipe import Recipe

SourceArgument = Annotated[
    str, typer.Argument(metavar="RECIPE_OR_FILE", help="Recipe (.yaml), file of rows, hub:... or builtin:...")
]
TemplateOption = Annotated[str | None, typer.Option("--template", help="Chat template, a .jinja file.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]
SelectorOption = Annotated[
    str | None,
    typer.Option(
        "--by",
        help="Selector: less, rds, ifd, reversed-ifd, k-center, cluster, diversity, longest, perplexity, judge, "
        "dedup, length or format. Default: the `select` section of the recipe.",
    ),
]


def check(
    source: SourceArgument,
    base: Annotated[
        str | None, typer.Option("--base", help="Base whose tokenizer and chat template are used. Default: smollm2.")
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option("--mask", help="Loss mask: response, last-turn, instruction, no-boilerplate or everything."),
    ] = None,
    template: TemplateOption = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Number of rows to show token by token.")] = 1,
    as_json: JsonOption = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write an HTML page that shows the rows token by token.")
    ] = None,
    network: NetworkOption = False,
    overrides: OverridesArgument = None,
) -> None:
    """Report the tokens and the quality of the training rows.

    Tokens: rows, lengths, supervised tokens, truncation, end of turn. Quality: duplicates, train/held-out overlap,
    refusals, encoding damage.
    """
    from rich.console import Console

    from graftlm.display import terminal
    from graftlm.rows import check_rows
    from graftlm.runs import check_page

    prepare_libraries()
    recipe = recipe_for(source, base, mask, template, network, overrides or [])
    found = check_rows(recipe, show=show, console=Console(stderr=True))
    for line in found.chosen:
        note(line)
    if html:
        check_page.write(html, found, recipe.data, title=source)
    if as_json:
        print(json.dumps(found.report.to_json() | {"held_out_rows": len(found.held_out), "shown": found.first_rows}))
        return
    console = Console()
    console.print(terminal.preflight(found.report))
    for row in found.first_rows:
        console.print(terminal.tokens(row))
    if html:
        console.print(f"wrote {html}", highlight=False, markup=False)


def select(
    source: SourceArgument,
    out: Annotated[Path, typer.Option("--out", help="File to write (.jsonl); the scores are written next to it.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="key=value",
            help="Keys of the selector or of the recipe, e.g. data.max_tokens=512: see docs/recipe.md.",
        ),
    ] = None,
    by: SelectorOption = None,
    keep: Annotated[
        str | None,
        typer.Option("--keep", metavar="N_OR_SHARE", help="Number of rows (100) or share of them (0.1) to keep."),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="File with a few rows of the target task, for less and rds.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Model that computes the scores. Default: smollm2.")
    ] = None,
    template: TemplateOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    network: NetworkOption = False,
) -> None:
    """Select the training rows with the best scores and write them.

    The scores are cached: another --keep computes nothing.
    """
    from rich.console import Console

    from graftlm.data.sources.mixing import read_data
    from graftlm.data.sources.row_cache import unread_keys
    from graftlm.data.sources.splits import every_row, for_supervised
    from graftlm.prepare import select_rows
    from graftlm.rows import is_recipe
    from graftlm.selection.choose import check_writable, write_rows

    prepare_libraries()
    check_writable(out, overwrite=overwrite)
    of_recipe, of_method = _by_owner(settings or [])
    recipe = recipe_for(source, base, None, template, network, of_recipe)
    recipe = _selecting(recipe, by, keep, target, of_method)
    tokenizer = recipe.tokenizer()
    usable = for_supervised if is_recipe(source) else every_row  # what a file of rows is for, nobody says
    data = read_data(recipe.data, seed=recipe.train.seed, network=recipe.network, usable=usable)
    for problem in (*data.problems, *unread_keys(data.train), *data.notes):
        warn(problem)
    rows = data.train
    selected_rows, choices = select_rows(recipe, rows, tokenizer, Console(stderr=True))
    scores = write_rows(out, selected_rows, choices)
    counts = {"rows": len(rows), "kept": len(selected_rows)}
    _print_choices(out, counts, scores, choices, as_json=as_json)


def _print_choices(out: Path, counts: dict[str, int], scores: list[Path], choices: list[Any], *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        found = counts | {"out": str(out), "scores": [str(file) for file in scores]}
        print(json.dumps(found | {"by": [asdict(choice) for choice in choices]}, default=str))
        return
    for choice in choices:
        print(choice.line())
    print(f"wrote {out}: {counts['kept']} of {counts['rows']} rows")


def _by_owner(settings: list[str]) -> tuple[list[str], list[str]]:
    """(keys of a recipe, keys of a selection method): a recipe's key begins with one of its sections."""
    from dataclasses import fields

    from graftlm.recipe import Recipe

    sections = {field.name for field in fields(Recipe)}
    of_recipe = [each for each in settings if each.partition("=")[0].partition(".")[0] in sections]
    return of_recipe, [each for each in settings if each not in of_recipe]


def _selecting(recipe: "Recipe", by: str | None, keep: str | None, target: str | None, settings: list[str]) -> "Recipe":
    """The recipe with the one selector that the command line describes, or with its own."""
    from graftlm.config.schema import build, to_tree
    from graftlm.config.source import lay_over
    from graftlm.errors import RecipeError
    from graftlm.recipe import Recipe
    from graftlm.selection import SELECTORS

    if by is None:
        if not recipe.select:
            raise RecipeError(
                f"--by: say how to choose, here or under `select` in the recipe. {nearest('', SELECTORS)}",
                code="missing-option",
            )
        if keep or target or settings:
            raise RecipeError(
                "--keep, --target and key=value belong to a method: name it with --by", code="missing-option"
            )
        return recipe
    if recipe.select:
        raise RecipeError(
            "the recipe has a `select` of its own: leave out --by to apply it, or take it out of the recipe",
            code="conflicting-settings",
        )
    check_choice(by, SELECTORS, "--by")
    fields: dict[str, Any] = {}
    lay_over(fields, [*settings, *([] if keep is None else [f"keep={keep}"])])
    fields |= {"by": by} if target is None else {"by": by, "target": target}
    config = build(SELECTORS[by].config, fields, source=f"--by {by}")
    return build(Recipe, to_tree(recipe) | {"select": [to_tree(config)]}, source="command line")


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="FILE", help="File of rows, config of another trainer, or recipe with one source."),
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write (.jsonl).")],
    to: Annotated[
        str, typer.Option("--to", help="Format to write. messages: OpenAI's format, one conversation a line.")
    ] = "messages",
    format: Annotated[str, typer.Option("--format", help="Format of FILE. auto: detect it.")] = "auto",
    overwrite: OverwriteOption = False,
    strict: Annotated[bool, typer.Option("--strict", help="Write nothing if any row is invalid.")] = False,
    network: NetworkOption = False,
) -> None:
    """Convert rows of any format to messages and report invalid rows."""
    from graftlm.config.schema import build
    from graftlm.data.sources.convert import convert
    from graftlm.data.sources.source import SourceConfig
    from graftlm.errors import DataError, RecipeError, numbered
    from graftlm.recipe import read_recipe
    from graftlm.rows import is_recipe

    check_choice(to, ("messages",), "--to")
    if is_recipe(source):
        data = read_recipe(source).data
        (config, *others), turn_order = data.sources(), data.turn_order
        if others:
            raise DataError(f"{source}: it has several sources: convert one after the other", code="several-sources")
        if format != "auto":
            raise RecipeError(f"{source}: the recipe says the format", code="conflicting-settings")
    else:
        config = build(SourceConfig, {"path": source, "format": format}, source="command line")
        turn_order = "refuse"
    count, problems = convert(config, out, overwrite=overwrite, strict=strict, network=network, turn_order=turn_order)
    for title, left_out in (("left out", True), ("noted", False)):
        if texts := [str(problem) for problem in problems if problem.left_out == left_out]:
            warn(f"{len(texts)} {title}:\n{numbered(texts)}")
    note(f"wrote {count} rows to {out}")


def recipe_for(
    source: str, base: str | None, mask: str | None, template: str | None, network: bool, overrides: list[str]
) -> "Recipe":
    """The recipe there, or one for a file of rows, with what the command line says laid over it."""
    from graftlm.config.schema import build, to_tree
    from graftlm.recipe import Recipe, read_recipe
    from graftlm.rows import is_recipe, recipe_of_rows

    recipe = read_recipe(source, overrides) if is_recipe(source) else recipe_of_rows(source, overrides)
    tree = to_tree(recipe)
    if isinstance(tree["base"], str):
        tree["base"] = {"name": tree["base"]}
    laid_over = {"base.name": base, "base.template": template, "data.mask": mask, "network": network or None}
    for key, value in laid_over.items():
        section, _, name = key.rpartition(".")
        if value is not None:
            (tree[section] if section else tree)[name] = value
    return build(Recipe, tree, source="command line")
