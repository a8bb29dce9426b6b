"""The command line: `graft`. One module a command; each imports what it needs when it runs, so that `--help` is
instant."""

import sys
from typing import Annotated

import typer

from graftlm import __version__, distributed
from graftlm.cli import (
    bench,
    cache,
    chat,
    compose,
    data,
    env,
    estimate,
    evaluate,
    export,
    generate,
    init,
    inspect,
    library,
    lr_range,
    merge,
    methods,
    runs,
    serve,
    sweep,
    train,
    transfer,
    verify,
)
from graftlm.cli.renamed import RenamedGroup
from graftlm.errors import GraftError
from graftlm.system import require_supported_platform, tune_process


def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"graftlm {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="graft",
    cls=RenamedGroup,
    help="Fine-tune a frozen language model through a small, removable adapter (a delta).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.callback(invoke_without_command=True)(top)
app.command("train")(train.train)
app.command("estimate")(estimate.estimate)
app.command("lr-range")(lr_range.lr_range)
app.command("runs")(runs.runs)
app.command("sweep")(sweep.sweep)
app.command("bench")(bench.bench)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("compose")(compose.compose)
app.command("transfer")(transfer.transfer)
app.command("merge")(merge.merge)
app.command("export")(export.export)
app.command("verify")(verify.verify)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("methods")(methods.methods)
app.command("init")(init.init)
app.command("env")(env.env)

data_app = typer.Typer(help="Check, select and convert training data.", no_args_is_help=True, rich_markup_mode=None)
data_app.command("check")(data.check)
data_app.command("select")(data.select)
data_app.command("convert")(data.convert)
app.add_typer(data_app, name="data")

library_app = typer.Typer(
    help="Keep adapters in a folder with an index: add, verify, search, find duplicates.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
library_app.command("list")(library.list_entries)
library_app.command("add")(library.add)
library_app.command("verify")(library.verify)
library_app.command("search")(library.search)
library_app.command("duplicates")(library.duplicates)
library_app.command("prune")(library.prune)
library_app.command("remove")(library.remove)
app.add_typer(library_app, name="library")

cache_app = typer.Typer(
    help="List and clear the cache folder: $GRAFT_CACHE, else ~/.cache/graftlm.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
cache_app.command("list")(cache.list_entries)
cache_app.command("clear")(cache.clear)
app.add_typer(cache_app, name="cache")


def main() -> None:
    """The entry point: an error that the user can put right is one message and exit code 1, never a traceback."""
    try:
        require_supported_platform()
        tune_process()
        app()
    except GraftError as error:
        if distributed.shows_errors():
            typer.secho(f"error[{error.code}]: {error}", fg="red", err=True)
        sys.exit(1)
    except Exception:
        if distributed.shows_errors():
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
