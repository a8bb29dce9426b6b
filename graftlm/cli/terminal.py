"""What commands print, and where: results to standard output, everything else to standard error."""

import json
import sys
from pathlib import Path
from typing import Any

import typer

from graftlm import distributed

WIDE = 250
"""Columns of a table that goes into a file or a pipe, where nothing need be folded."""


def print_json(tree: Any) -> None:
    print(json.dumps(tree, indent=2))


def print_table(columns: list[str], rows: list[list[str]], title: str = "") -> None:
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


def note(text: str) -> None:
    typer.secho(text, err=True)


def warn(text: str) -> None:
    typer.secho(text, fg="yellow", err=True)


def wrote(path: Path) -> None:
    note(f"wrote {path}")


def prepare_libraries() -> None:
    """Our own bars are enough: transformers' loading bars and advice off. Warn of versions that were never tested."""
    from transformers.utils import logging

    from graftlm.versions import untested

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if distributed.first() and (warning := untested()):
        warn(f"warning: {warning}")
