"""The command line: `graft`. Every command imports what it needs when it runs, so that `--help` is instant."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm import __version__, distributed
from graftlm.errors import GraftError, nearest
from graftlm.system import require_supported_platform, tune_process

if TYPE_CHECKING:
    import datetime

    from graftlm.cache import Entry
    from graftlm.data.sources.formats import Message
    from graftlm.recipe import Recipe
    from graftlm.runs.compare import Comparison

app = typer.Typer(
    name="graft",
    help="Teach a frozen language model new behaviour through a small, removable delta.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(
    help="Look at training data as training will see it.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")
cache_app = typer.Typer(
    help="What graftlm keeps in its cache folder: $GRAFT_CACHE, else ~/.cache/graftlm.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache_app, name="cache")

BaseOption = Annotated[str, typer.Option("--base", help="smollm2, a folder, a .gguf file or a hub id.")]
AdapterOption = Annotated[
    list[Path] | None, typer.Option("--adapter", help="An adapter folder, ours or PEFT's; several act in this order.")
]
StoreOption = Annotated[
    str | None, typer.Option("--store", help="How the base is kept: auto, fp32, bf16, fp16, int8, nf4 or int4.")
]
NetworkOption = Annotated[bool, typer.Option("--network", help="Allow a base to be fetched from the hub.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Sample among so many likeliest tokens; 0: all.")]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample among the likeliest tokens with this probability.")
]
MinPOption = Annotated[
    float,
    typer.Option("--min-p", min=0.0, max=1.0, help="Leave out tokens with less than this share of the likeliest's."),
]
PenaltyOption = Annotated[
    float,
    typer.Option("--repetition-penalty", min=0.01, help="Above 1: tokens that were there already are less likely."),
]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", help="End the answer before this text; repeat the option for several.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="For sampling at a temperature above 0.")]
TodayOption = Annotated[
    str | None,
    typer.Option(
        "--today",
        metavar="DATE",
        help="For chat templates that write the date: YYYY-MM-DD, or now; default the day of the adapter's training.",
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]...",
        help="Override keys of the recipe: train.steps=100, policies.0.ratio=4 (entries count from 0).",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def main() -> None:
    """The entry point: an error that the user can put right is one message and exit code 1, never a traceback."""
    try:
        require_supported_platform()
        tune_process()
        app()
    except GraftError as error:
        if distributed.shows_errors():
            typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
        sys.exit(1)
    except Exception:
        if distributed.shows_errors():
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"graftlm {__version__}")
        raise typer.Exit


@app.command()
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
    _prepare_libraries()
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
        print(json.dumps(found, indent=2))
    else:
        for line in (*lr_range.lines(found, recipe), f"wrote {page}"):
            print(line)


@app.command("plan")
def plan_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: see docs/recipe.md.")],
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe will need, peak memory and time, before a weight is loaded."""
    from graftlm.planning.estimate import plan
    from graftlm.recipe import read_recipe

    _prepare_libraries()
    found = plan(read_recipe(recipe, overrides or []))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"peak memory  {found['peak_gib']:.2f} GiB of {found['memory_free_gib']:.1f} that are free")
    for name, gib in found["parts"]["memory_gib"].items():
        print(f"  {name.replace('_', ' '):25} {gib:8.2f} GiB")
    print(f"a step       {found['step_s']:.2f} s, {found['tokens_per_s']:,.0f} tokens/s")
    for name, seconds in found["parts"]["time_s"].items():
        print(f"  {name.replace('_', ' '):25} {seconds:8.2f} s")
    for line in found["reach"]:
        print(line)
    for line in found["advice"]:
        print(f"advice: {line}")


SortOption = Annotated[str | None, typer.Option("--sort", metavar="COLUMN", help="Order the rows by this column.")]
ReverseOption = Annotated[bool, typer.Option("--reverse", help="Largest first.")]
TableOption = Annotated[
    Path | None, typer.Option("--html", help="Write a page with the table and the loss of every step.")
]


@app.command("runs")
def runs_command(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Where to look; by default here.")
    ] = None,
    sort: SortOption = None,
    reverse: ReverseOption = False,
    as_json: JsonOption = False,
    html: TableOption = None,
) -> None:
    """Compare the runs in and below some folders: what differs in their recipes, and what came of them."""
    from graftlm.runs.compare import compare

    _show_runs(compare(folders or [Path()]), sort, reverse, as_json, html)


def _show_runs(
    found: "Comparison", sort: str | None, reverse: bool, as_json: bool, html: Path | None, **more: Any
) -> None:
    """The table, or JSON with `more` beside it; the page too, where one is asked for."""
    from graftlm.runs import compare

    rows = found.rows(sort, reverse=reverse)
    if html:
        from graftlm.files import writing

        with writing(html):
            html.write_text(compare.html(found, rows, title=f"{len(rows)} runs"), encoding="utf-8")
        typer.secho(f"wrote {html}", err=True)
    if as_json:
        print(json.dumps(compare.to_json(found, sort, reverse=reverse) | more, indent=2))
        return
    for title, told in (("", rows), ("over seeds: mean +- standard deviation of single runs", found.over_seeds())):
        if told:
            _print_table(*compare.cells(told), title=title)
    if not rows:
        print("no run here: a run is a folder with a metrics.jsonl")
    for folder, why in found.damaged.items():
        typer.secho(f"{folder} cannot be read: {why}", fg="yellow", err=True)


def _print_table(columns: list[str], rows: list[list[str]], title: str = "") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column.replace("_", " "), no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: brackets are no markup
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


WIDE = 250
"""Columns of a table that goes into a file or a pipe, where nothing need be folded."""


@app.command("sweep")
def sweep_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: see docs/recipe.md.")],
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

    points = sweeping.grid(recipe, grid)
    outcome = sweeping.sweep(points, out, on=on, say=lambda line: typer.secho(line, err=True))
    made = [out / point.name for point in points if (out / point.name).is_dir()]
    _show_runs(compare(made), sort, reverse, as_json, html, failed=outcome.failed)
    for name, why in outcome.failed.items():
        typer.secho(f"{name} FAILED: {why}\n  all of it: {out / 'logs' / name}.log", fg="red", err=True)
    if outcome.failed:
        raise typer.Exit(1)
    if len(outcome.skipped) + len(outcome.done) < len(points):
        typer.secho("stopped: the same command goes on", err=True)
        raise typer.Exit(RESUMABLE)


@app.command("bench")
def bench_command(
    base: BaseOption = "smollm2",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default torch's own.")] = None,
    kernels: Annotated[
        str, typer.Option("--kernels", help="As train.kernels: auto, ours, torch or compiled.")
    ] = "auto",
    as_json: JsonOption = False,
    network: NetworkOption = False,
) -> None:
    """Measure how fast this machine could train, and how fast it does: LoRA on built-in rows, about half a minute."""
    from graftlm.planning.bench import bench
    from graftlm.training.loop import TrainConfig

    _prepare_libraries()
    config = TrainConfig(kernels=kernels)  # type: ignore[arg-type]  # it checks the name
    found = bench(base, threads=threads, kernels=config.kernels, network=network)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for dtype, rates in found["matrix_gflops_by_dtype"].items():
        each = ", ".join(f"{rate:,.0f} {name.replace('_', ' ')}" for name, rate in rates.items())
        print(f"matrix products in {dtype}: {each} (GFLOP/s, {found['threads']} threads)")
    print(f"a token needs {found['mflop_per_token']:,.0f} MFLOP: at most {found['floor_tokens_per_s']:,.0f} tokens/s")
    print(f"LoRA does {found['tokens_per_s']:,.0f} tokens/s: {found['share_of_floor']:.0%} of it")
    for name, share in found["parts"].items():
        print(f"  {name:16} {share:5.0%}")
    print("kernels: " + "; ".join(found["kernels_by_operation"]))
    for each in found["kernels"]["classes"]:
        times = ", ".join(f"{name} {us:,.0f}" for name, us in each["microseconds"].items())
        print(f"  {each['calls']:55} {each['by']:8} (microseconds: {times})")


@data_app.command("check")
def data_check(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe (.yaml), a file of rows, hub:... or builtin:...")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="Whose tokenizer and chat template; default smollm2.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", help="response, last-turn, instruction, no-boilerplate or everything.")
    ] = None,
    template: Annotated[str | None, typer.Option("--template", help="A .jinja file to use as chat template.")] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Show this many rows token by token.")] = 1,
    as_json: JsonOption = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page to leaf through the rows, token by token.")
    ] = None,
    network: NetworkOption = False,
    overrides: OverridesArgument = None,
) -> None:
    """Report what training would see: rows, tokens, what is supervised, what is dropped, what ends an answer; and what
    the rows look like: duplicates, overlap with held-out rows, refusals, damage."""
    from rich.console import Console

    from graftlm.display import terminal
    from graftlm.run import prepare_data
    from graftlm.runs import check_page
    from graftlm.training.tokenizer import recipe_tokenizer

    _prepare_libraries()
    recipe = _recipe_for(source, base, mask, template, network, overrides or [])
    tokenizer = recipe_tokenizer(recipe)
    found = prepare_data(recipe, tokenizer, show=show, look=True, console=Console(stderr=True))
    for line in found.chosen:
        typer.secho(line, err=True)
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


@data_app.command("select")
def data_select(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe (.yaml), a file of rows, hub:... or builtin:...")
    ],
    out: Annotated[Path, typer.Option("--out", help="The .jsonl file to write, its scores beside it.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="Keys of the method that --by names, or keys of the recipe, e.g. data.max_tokens=512: see "
            "docs/recipe.md.",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            help="less, rds, ifd, reversed-ifd, k-center, cluster, diversity, longest, perplexity, judge, dedup, "
            "length or format; by default what the recipe's own `select` says.",
        ),
    ] = None,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="N_OR_SHARE", help="So many rows (100), or a share (0.1).")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="For less and rds: a few rows of the kind wanted.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="The model that is asked; default smollm2.")] = None,
    template: Annotated[str | None, typer.Option("--template", help="A .jinja file to use as chat template.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: JsonOption = False,
    network: NetworkOption = False,
) -> None:
    """Write the rows most worth training on; scores are kept, so that another --keep computes nothing."""
    from dataclasses import asdict

    from rich.console import Console

    from graftlm.data.sources.mixing import read_data
    from graftlm.data.sources.row_cache import unread_keys
    from graftlm.data.sources.splits import every_row, for_supervised
    from graftlm.selection.choose import check_writable, choose, write_rows
    from graftlm.training.tokenizer import recipe_tokenizer

    _prepare_libraries()
    check_writable(out, overwrite=overwrite)
    of_recipe, of_method = _by_owner(settings or [])
    recipe = _recipe_for(source, base, None, template, network, of_recipe)
    recipe = _selecting(recipe, by, keep, target, of_method)
    tokenizer = recipe_tokenizer(recipe)
    usable = for_supervised if _is_recipe(source) else every_row  # what a file of rows is for, nobody says
    read = read_data(recipe.data, seed=recipe.train.seed, network=recipe.network, usable=usable)
    for problem in (*read.problems, *unread_keys(read.train), *read.notes):
        typer.secho(problem, fg="yellow", err=True)
    rows = read.train
    kept, choices = choose(recipe, rows, tokenizer, Console(stderr=True))
    scores = write_rows(out, kept, choices)
    if as_json:
        found = {"rows": len(rows), "kept": len(kept), "out": str(out), "scores": [str(file) for file in scores]}
        print(json.dumps(found | {"by": [asdict(choice) for choice in choices]}, default=str))
        return
    for choice in choices:
        print(choice.line())
    print(f"wrote {out}: {len(kept)} of {len(rows)} rows")


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
                f"--by: say how to choose, here or under `select` in the recipe. {nearest('', SELECTORS)}"
            )
        if keep or target or settings:
            raise RecipeError("--keep, --target and key=value belong to a method: name it with --by")
        return recipe
    if recipe.select:
        raise RecipeError(
            "the recipe has a `select` of its own: leave out --by to apply it, or take it out of the recipe"
        )
    if by not in SELECTORS:
        raise RecipeError(f"--by {by}: no such method. {nearest(by, SELECTORS)}")
    fields: dict[str, Any] = {}
    lay_over(fields, [*settings, *([] if keep is None else [f"keep={keep}"])])
    fields |= {"by": by} if target is None else {"by": by, "target": target}
    config = build(SELECTORS[by].config, fields, source=f"--by {by}")
    return build(Recipe, to_tree(recipe) | {"select": [to_tree(config)]}, source="command line")


@data_app.command("convert")
def data_convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Rows, what another trainer describes, or a recipe: all rows of its source."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The .jsonl file to write.")],
    to: Annotated[str, typer.Option("--to", help="messages: OpenAI's, one conversation a line.")] = "messages",
    format: Annotated[str, typer.Option("--format", help="The format of FILE, if not to be detected.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Write nothing if a row cannot be used.")] = False,
    network: NetworkOption = False,
) -> None:
    """Write rows of any format as messages, and report those that cannot be used."""
    from graftlm.config.schema import build
    from graftlm.data.sources.convert import convert
    from graftlm.data.sources.source import SourceConfig
    from graftlm.errors import DataError, numbered
    from graftlm.recipe import read_recipe

    if to != "messages":
        raise DataError(f"--to {to}: no such format to write. {nearest(to, ['messages'])}")
    if _is_recipe(source):
        data = read_recipe(source).data
        (config, *others), turn_order = data.sources(), data.turn_order
        if others or format != "auto":
            why = "it has several sources: convert one after the other" if others else "the recipe says the format"
            raise DataError(f"{source}: {why}")
    else:
        config = build(SourceConfig, {"path": source, "format": format}, source="command line")
        turn_order = "refuse"
    count, problems = convert(config, out, overwrite=overwrite, strict=strict, network=network, turn_order=turn_order)
    for title, left_out in (("left out", True), ("noted", False)):
        if told := [str(problem) for problem in problems if problem.left_out == left_out]:
            typer.secho(f"{len(told)} {title}:\n{numbered(told)}", fg="yellow", err=True)
    typer.secho(f"wrote {count} rows to {out}", err=True)


def _is_recipe(source: str) -> bool:
    """Whether it is a recipe of ours, and neither a file of rows nor what another trainer describes."""
    from graftlm.data.sources.axolotl import is_axolotl

    return Path(source).suffix in (".yaml", ".yml") and not is_axolotl(source)


def _recipe_for(
    source: str, base: str | None, mask: str | None, template: str | None, network: bool, overrides: list[str]
) -> "Recipe":
    """The recipe there, or one for a file of rows, with what the command line says laid over it."""
    from graftlm.config.schema import build, to_tree
    from graftlm.config.source import lay_over
    from graftlm.recipe import Recipe, read_recipe

    if _is_recipe(source):
        recipe = read_recipe(source, overrides)
    else:
        rows: dict[str, Any] = {"data": {"train": source}}
        lay_over(rows, overrides)
        recipe = build(Recipe, rows, source="command line")
    tree = to_tree(recipe)
    if isinstance(tree["base"], str):
        tree["base"] = {"name": tree["base"]}
    laid_over = {"base.name": base, "base.template": template, "data.mask": mask, "network": network or None}
    for key, value in laid_over.items():
        section, _, name = key.rpartition(".")
        if value is not None:
            (tree[section] if section else tree)[name] = value
    return build(Recipe, tree, source="command line")


@app.command()
def generate(
    question: Annotated[str | None, typer.Argument(metavar="[QUESTION]", help="What to ask.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The same as QUESTION.")] = None,
    base: BaseOption = "smollm2",
    adapter: AdapterOption = None,
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    stop: StopOption = None,
    seed: SeedOption = 0,
    today: TodayOption = None,
    store: StoreOption = None,
    network: NetworkOption = False,
) -> None:
    """Answer one question and print the answer."""
    from graftlm.generation.answer import answer

    if (question is None) == (prompt is None):
        raise typer.BadParameter('give one question: graft generate "How are you?"', param_hint="QUESTION")
    options = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, stop) | {"today": _day(today)}
    model, tokenizer = _load(base, adapter or [], network, store)
    asked = question if question is not None else prompt
    print(answer(model, tokenizer, asked or "", max_new_tokens=max_new_tokens, seed=seed, **options))


def _sampling(
    temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float, stop: list[str] | None
) -> dict[str, Any]:
    """How tokens are chosen, as `answer` takes it; what would do nothing is wrong usage."""
    from graftlm.generation.generate import check_sampling

    try:
        check_sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--temperature") from None
    if "" in (stop or []):
        raise typer.BadParameter("an empty text would end every answer at once", param_hint="--stop")
    chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return chosen | {"repetition_penalty": repetition_penalty, "stop": stop or ()}


def _day(today: str | None) -> "datetime.date | None":
    import datetime

    if today is None:
        return None
    try:
        return datetime.date.today() if today == "now" else datetime.date.fromisoformat(today)
    except ValueError:
        raise typer.BadParameter(f"{today!r} is no date: write YYYY-MM-DD, or now", param_hint="--today") from None


CHAT_HELP = "/base turns the delta off, /tuned on again, /new starts over, /quit leaves"


@app.command()
def chat(
    base: BaseOption = "smollm2",
    adapter: AdapterOption = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    turn_order: Annotated[
        str | None,
        typer.Option(
            "--turn-order",
            help="For chat templates without a place for it: refuse, merge into the first question, or drop; default "
            "as the adapter was trained.",
        ),
    ] = None,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    stop: StopOption = None,
    seed: SeedOption = 0,
    today: TodayOption = None,
    store: StoreOption = None,
    network: NetworkOption = False,
) -> None:
    """Talk with the model; answers stream. /base switches the delta off in mid-conversation."""
    from graftlm.data.sources.formats import Message
    from graftlm.generation.answer import answer, chat_renderer
    from graftlm.model.layers.attach import activate, attachment

    options = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, stop)
    rendering: dict[str, Any] = {"today": _day(today), "turn_order": _turn_order(turn_order)}
    model, tokenizer = _load(base, adapter or [], network, store)
    start = [Message("system", system)] if system else []
    history, mode = list(start), "tuned" if adapter else "base"

    def ask(messages: list[Message]) -> str:
        say = partial(answer, model, tokenizer, messages, on_text=_write, **rendering)
        return say(max_new_tokens=max_new_tokens, seed=seed, **options)

    if system:  # what the template does not take is said before anybody types
        chat_renderer(model, tokenizer, **rendering).prompt([*start, Message("user", "?")])
    typer.secho(CHAT_HELP, dim=True, err=True)
    for line in _lines():
        if line in ("/quit", "/exit"):
            break
        if line == "/new":
            history = list(start)
        elif line in ("/base", "/tuned"):
            if not adapter:
                typer.secho("there is no delta: start with --adapter FOLDER", fg="yellow", err=True)
                continue
            mode = line[1:]
            activate(model, *(attachment(model).configs if mode == "tuned" else ()))
        elif line.startswith("/"):
            typer.secho(
                f"{line}: no such command. {nearest(line, ['/base', '/tuned', '/new', '/quit'])}", fg="yellow", err=True
            )
        elif line:
            history = _turn(history, line, ask)


def _turn_order(how: str | None) -> str | None:
    from typing import get_args

    from graftlm.data.chat.turn_order import TurnOrder

    if how is not None and how not in get_args(TurnOrder):
        raise typer.BadParameter(f"{how}: {nearest(how, get_args(TurnOrder))}", param_hint="--turn-order")
    return how


def _turn(history: "list[Message]", line: str, ask: "Callable[[list[Message]], str]") -> "list[Message]":
    """One question and its answer, added to the history; an answer that Ctrl-C cuts off is forgotten."""
    from graftlm.data.sources.formats import Message

    asked = [*history, Message("user", line)]
    try:
        said = ask(asked)
    except KeyboardInterrupt:
        typer.secho("\n(stopped; this turn is forgotten)", dim=True, err=True)
        return history
    print()
    return [*asked, Message("assistant", said)]


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _load(base: str, adapters: list[Path], network: bool, store: str | None = None) -> tuple[Any, Any]:
    from graftlm.adapters.store import adapters_in, load_adapter, template_of, tokenizer_of
    from graftlm.model.hub.load import load_base

    _prepare_libraries()
    model, tokenizer = load_base(base, store=store, network=network)
    several = sum(len(adapters_in(folder)) for folder in adapters) > 1
    for number, folder in enumerate(adapters):
        for name, path in adapters_in(folder).items():
            unique = f"{number + 1}-{name}" if several else name
            typer.secho(load_adapter(model, path, name=unique), dim=True, err=True)
    tokenizer = tokenizer_of(model, tokenizer)  # `merge` and `export` write it, and the chat template
    tokenizer.chat_template = template_of(model) or tokenizer.chat_template
    return model, tokenizer


DtypeOption = Annotated[str, typer.Option("--dtype", help="fp32, or bf16: half the size, and rounding is reported.")]


@app.command()
def merge(
    adapter: Annotated[list[Path], typer.Option("--adapter", help="An adapter folder; several act in this order.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.")],
    base: BaseOption = "smollm2",
    dtype: DtypeOption = "fp32",
    store: StoreOption = None,
    network: NetworkOption = False,
) -> None:
    """Write the base with one or more adapters folded in, as a model that needs neither graftlm nor PEFT."""
    from graftlm.adapters.export.export import export

    model, tokenizer = _load(base, adapter, network, store)
    stop_ids = _stop_ids(tokenizer)
    made = export(model, out, to="merged", dtype=_dtype(dtype), tokenizer=tokenizer, stop_ids=stop_ids)
    _say_what_changed(made, dtype)
    typer.secho(f"wrote {out}", err=True)


@app.command("export")
def export_command(
    adapter: Annotated[Path, typer.Argument(metavar="DIR", help="An adapter folder, ours or PEFT's.")],
    to: Annotated[str, typer.Option("--to", help="peft, plain-lora, merged, gguf or delta.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.")],
    base: BaseOption = "smollm2",
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Keep so many factors of a delta that has none exactly.")
    ] = None,
    dtype: DtypeOption = "fp32",
    as_json: JsonOption = False,
    store: StoreOption = None,
    network: NetworkOption = False,
) -> None:
    """Write an adapter in a form that others read, and say which server will take it."""
    from graftlm.adapters.export.export import EXPORTS, export
    from graftlm.adapters.export.lint import lint, to_json
    from graftlm.errors import TargetError

    if to not in EXPORTS:
        raise TargetError(f"--to {to}: no such kind. {nearest(to, EXPORTS)}")
    model, tokenizer = _load(base, [adapter], network, store)
    stop_ids = _stop_ids(tokenizer)
    made = export(model, out, to=to, rank=rank, dtype=_dtype(dtype), tokenizer=tokenizer, stop_ids=stop_ids)
    verdicts = lint(out)
    if as_json:
        print(json.dumps(made | {"servers": to_json(verdicts)}, indent=2))
        return
    if "errors" in made and not made["exact"]:
        worst = max(made["errors"], key=made["errors"].get)
        print(f"not exact: rank {made['rank']} leaves out {made['errors'][worst]:.1%} of {worst}, the worst layer")
    _say_what_changed(made, dtype)
    for verdict in verdicts:
        print(f"{verdict.server:14}{'yes' if verdict.accepts else 'no':5}{'; '.join(verdict.why)}")


def _stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """What ends an answer by the chat template; a template that cannot be used is no reason not to write weights."""
    from graftlm.data.chat.render import Renderer
    from graftlm.errors import BaseModelError

    try:
        return Renderer(tokenizer).stop_ids
    except BaseModelError as error:
        why = f"{error}. So the token that ends an answer is not known, and the stop tokens stay the base's"
        typer.secho(f"warning: {why}", fg="yellow", err=True)
        return ()


def _dtype(name: str) -> Any:
    import torch

    from graftlm.errors import TargetError

    known = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if name not in known:
        raise TargetError(f"--dtype {name}: no such dtype. {nearest(name, known)}")
    return known[name]


def _say_what_changed(made: dict[str, Any], dtype: str) -> None:
    if made.get("untied"):
        said = "the output head was tied to the embeddings; a delta sits on one of them, so both are written, untied"
        typer.secho(f"warning: {said}", fg="yellow", err=True)
    if (end := made.get("missing_end")) is not None:
        said = f"{end['why']}: a server needs it as a stop token of each request (stop_token_ids in vLLM)"
        typer.secho(f"warning: {said}, or use `graft merge`, which writes it into the model", fg="yellow", err=True)
    if (lost := made.get("lost_by_quantising")) is not None:
        typer.secho(f"warning: {_said_of_codes(made['base_store'], lost)}", fg="yellow", err=True)
    lost = made.get("lost", [])
    if dtype == "fp32" or not lost:
        return
    worst, share = lost[0]
    middle = lost[len(lost) // 2][1]
    typer.secho(
        f"warning: {dtype} loses {middle:.0%} of the change of the middle layer and {share:.0%} of {worst}, the worst; "
        "--dtype fp32 keeps it whole",
        fg="yellow",
        err=True,
    )


def _said_of_codes(store: str, lost: list[list[Any]] | str) -> str:
    said = f"the merged weights are those of the base in {store}, plus the change, in float. "
    if isinstance(lost, str):
        return f"{said}How far they are from the float base plus the change is not known: {lost}"
    if not lost:
        return f"{said}No layer was changed"
    (worst, share), (middle, middle_share) = lost[0], lost[len(lost) // 2]
    return (
        f"{said}From the float base plus the change they are {share:.2g} times the change away at {worst}, the worst "
        f"layer, and {middle_share:.2g} times at {middle}, the middle one"
    )


@app.command()
def methods(
    wanted: Annotated[
        str | None,
        typer.Option(
            "--for", help="What matters, in words: quality, memory, speed, size, forgetting, serving, merging."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the methods: what each can do, and what it did on the job of benchmarks/methods."""
    from graftlm.planning.advice import facts, suggest

    rows = facts() if wanted is None else suggest(wanted)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    about = METHOD_COLUMNS if wanted is None else CHOSEN_COLUMNS
    shown = {key: heading for key, heading in about.items() if any(row.get(key) is not None for row in rows)}
    _print_table(list(shown.values()), [[_short(row.get(key)) for key in shown] for row in rows])


METHOD_COLUMNS = {
    "name": "method",
    "mergeable": "merges",
    "factors": "is LoRA",
    "peft_type": "in PEFT",
    "learning_rate": "rate",
    "parameters_trained": "parameters",
    "held_out_loss": "held-out loss",
    "rouge_l": "ROUGE-L",
    "forgotten": "forgotten",
    "step_ratio": "step / LoRA's",
    "peak_over_lora_gib": "GiB over LoRA's",
}
CHOSEN_COLUMNS = {key: METHOD_COLUMNS[key] for key in ("name", "held_out_loss", "forgotten", "step_ratio")} | {
    "why": "why"
}
"""What the table shows of a method's facts; `--json` prints all of them."""


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


@app.command("init")
def init_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A recipe; without it, they are listed.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The file to write; default NAME.yaml.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a recipe to start from, with comments. Without NAME, list the recipes."""
    from graftlm.files import check_new, whole
    from graftlm.recipes import recipes, title

    known = recipes()
    if name is None:
        if out or overwrite:
            raise typer.BadParameter("name the recipe to write", param_hint="NAME")
        for each, file in known.items():
            print(f"{each:14} {title(file)}")
        print("\ngraft init NAME writes NAME.yaml; graft train NAME.yaml trains it")
        return
    if name not in known:
        raise typer.BadParameter(f"{name}: no such recipe. {nearest(name, known)}", param_hint="NAME")
    out = out or Path(f"{name}.yaml")
    check_new(out, overwrite=overwrite)
    with whole(out) as draft:
        draft.write_bytes(known[name].read_bytes())
    typer.secho(f"wrote {out}: graft train {out}", err=True)


@app.command("env")
def env_command(as_json: JsonOption = False) -> None:
    """Print what a bug report needs: versions, platform, processor, memory, compiler, GPUs and cache."""
    from graftlm import environment

    found = environment.environment()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(environment.lines(found)))


KindOption = Annotated[
    list[str] | None,
    typer.Option("--kind", help="bases, fingerprints, kernels, rows or scores; repeat the option for several."),
]


@cache_app.command("list")
def cache_list(as_json: JsonOption = False) -> None:
    """List what graftlm keeps in its cache folder, by kind: entries, size and age."""
    from graftlm import cache
    from graftlm.files import cache_folder

    found, others = cache.entries(), cache.others()
    if as_json:
        tree = [entry._asdict() | {"path": str(entry.path)} for entry in found]
        print(
            json.dumps({"folder": str(cache_folder()), "entries": tree, "others": [str(p) for p in others]}, indent=2)
        )
        return
    print(cache_folder())
    for kind, about in cache.KINDS.items():
        print(f"{kind:13} {_size_and_age([entry for entry in found if entry.kind == kind]):42} {about.holds}")
    for path in others:
        print(f"not written by graftlm, and left alone: {path}")


@cache_app.command("clear")
def cache_clear(
    kind: KindOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove what graftlm keeps in its cache folder, all of it or some kinds; it is made again when it is needed."""
    from graftlm import cache
    from graftlm.files import cache_folder

    kinds = tuple(dict.fromkeys(kind or cache.KINDS))
    for each in kinds:
        if each not in cache.KINDS:
            raise typer.BadParameter(f"{each}: no such kind. {nearest(each, cache.KINDS)}", param_hint="--kind")
    found = cache.entries(kinds)
    if not found:
        print(f"nothing to remove in {cache_folder()}")
        return
    for each in kinds:
        if of_kind := [entry for entry in found if entry.kind == each]:
            print(f"{each:13} {_size_and_age(of_kind)}")
    if not yes:
        typer.confirm(f"Remove these from {cache_folder()}?", abort=True)
    cache.clear(found)
    print(f"removed {len(found)} entries")


def _size_and_age(found: "Sequence[Entry]") -> str:
    if not found:
        return "empty"
    from graftlm.environment import megabytes

    ages = sorted((time.time() - entry.modified) / 86400 for entry in found)
    days = f"{ages[0]:.0f}" if round(ages[0]) == round(ages[-1]) else f"{ages[0]:.0f} to {ages[-1]:.0f}"
    entries = "1 entry" if len(found) == 1 else f"{len(found)} entries"
    return f"{entries}, {megabytes(sum(entry.bytes for entry in found))}, {days} days old"


def _prepare_libraries() -> None:
    """Our own bars are enough: transformers' loading bars and advice off. Warn of versions that were never tested."""
    from transformers.utils import logging

    from graftlm.versions import untested

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if distributed.first() and (warning := untested()):
        typer.secho(f"warning: {warning}", fg="yellow", err=True)


if __name__ == "__main__":
    main()
