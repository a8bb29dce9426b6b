"""The command line: `graft`. Every command imports what it needs when it runs, so that `--help` is instant."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm import __version__
from graftlm.errors import GraftError, nearest

if TYPE_CHECKING:
    from graftlm.data.formats import Message
    from graftlm.training.recipe import Recipe

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

BaseOption = Annotated[str, typer.Option("--base", help="smollm2, a folder, a .gguf file or a hub id.")]
AdapterOption = Annotated[Path | None, typer.Option("--adapter", help="An adapter folder, ours or PEFT's.")]
NetworkOption = Annotated[bool, typer.Option("--network", help="Allow a base to be fetched from the hub.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
SeedOption = Annotated[int, typer.Option("--seed", help="For sampling at a temperature above 0.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def main() -> None:
    """The entry point: an error that the user can put right is one message and exit code 1, never a traceback."""
    try:
        app()
    except GraftError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
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
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Laid over the recipe.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The adapter folder to write.")] = Path("adapter"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
) -> None:
    """Train the delta that a recipe describes."""
    from rich.console import Console

    from graftlm.training.recipe import read_recipe
    from graftlm.training.run import INTERRUPTED
    from graftlm.training.run import train as run

    _quiet_libraries()
    result = run(read_recipe(recipe, overrides or []), out, overwrite=overwrite, console=Console())
    if result.summary.get("interrupted"):
        raise typer.Exit(INTERRUPTED)


@data_app.command("check")
def data_check(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe (.yaml), a file of rows, hub:... or builtin:...")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="Whose tokenizer and chat template; default smollm2.")
    ] = None,
    mask: Annotated[str | None, typer.Option("--mask", help="response, instruction or everything.")] = None,
    template: Annotated[str | None, typer.Option("--template", help="A .jinja file to use as chat template.")] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Show this many rows token by token.")] = 1,
    as_json: JsonOption = False,
    network: NetworkOption = False,
) -> None:
    """Report what training would see: rows, tokens, what is supervised, what is dropped, what ends an answer."""
    from rich.console import Console

    from graftlm.model.load import load_tokenizer
    from graftlm.training import display
    from graftlm.training.run import prepare_data

    _quiet_libraries()
    recipe = _recipe_for(source, base, mask, template, network)
    found = prepare_data(recipe, load_tokenizer(recipe.base, network=recipe.network), show=show)
    if as_json:
        print(json.dumps(found.report.to_json() | {"held_out_rows": len(found.held_out), "shown": found.first_rows}))
        return
    console = Console()
    console.print(display.preflight(found.report))
    for row in found.first_rows:
        console.print(display.tokens(row))


def _recipe_for(source: str, base: str | None, mask: str | None, template: str | None, network: bool) -> "Recipe":
    """The recipe there, or one for a file of rows, with what the command line says laid over it."""
    from graftlm.config import build, to_tree
    from graftlm.training.recipe import Recipe, read_recipe

    if Path(source).suffix in (".yaml", ".yml"):
        recipe = read_recipe(source)
    else:
        recipe = build(Recipe, {"data": {"train": source}}, source="command line")
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
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask.")],
    base: BaseOption = "smollm2",
    adapter: AdapterOption = None,
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    network: NetworkOption = False,
) -> None:
    """Answer one prompt and print the answer."""
    from graftlm.training.answer import answer

    model, tokenizer = _load(base, adapter, network)
    print(answer(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))


CHAT_HELP = "/base turns the delta off, /tuned on again, /new starts over, /quit leaves"


@app.command()
def chat(
    base: BaseOption = "smollm2",
    adapter: AdapterOption = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    network: NetworkOption = False,
) -> None:
    """Talk with the model; answers stream. /base switches the delta off in mid-conversation."""
    from graftlm.data.formats import Message
    from graftlm.model.attach import activate, attachment
    from graftlm.training.answer import answer

    model, tokenizer = _load(base, adapter, network)
    start = [Message("system", system)] if system else []
    history, mode = list(start), "tuned" if adapter else "base"

    def ask(messages: list[Message]) -> str:
        say = partial(answer, model, tokenizer, messages, on_text=_write)
        return say(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    typer.secho(CHAT_HELP, dim=True, err=True)
    for line in _lines():
        if line in ("/quit", "/exit"):
            break
        if line == "/new":
            history = list(start)
        elif line in ("/base", "/tuned"):
            if adapter is None:
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


def _turn(history: "list[Message]", line: str, ask: "Callable[[list[Message]], str]") -> "list[Message]":
    """One question and its answer, added to the history; an answer that Ctrl-C cuts off is forgotten."""
    from graftlm.data.formats import Message

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


def _load(base: str, adapter: Path | None, network: bool) -> tuple[Any, Any]:
    from graftlm.model.load import load_base
    from graftlm.model.store import load_adapter

    _quiet_libraries()
    model, tokenizer = load_base(base, network=network)
    if adapter is not None:
        typer.secho(load_adapter(model, adapter), dim=True, err=True)
        template = adapter / "chat_template.jinja"
        if template.is_file():  # what it was trained with is what it is asked with
            tokenizer.chat_template = template.read_text(encoding="utf-8")
    return model, tokenizer


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the methods, and what each can do."""
    from graftlm.deltas import METHODS

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "family": method.delta.family,
            "paper": method.delta.paper,
            "parameters": method.delta.formula,
            "mergeable": method.mergeable,
            "factors": method.has_factors,
            "peft_type": method.delta.peft.type if method.delta.peft else None,
        }
        for name, method in METHODS.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


def _quiet_libraries() -> None:
    """Our own bars are enough: transformers' loading bars and advice off."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
