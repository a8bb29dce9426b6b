"""`graft runs`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm.cli.options import JsonOption, ReverseOption, SortOption, TableOption
from graftlm.cli.terminal import print_json, print_table, warn, wrote

if TYPE_CHECKING:
    from graftlm.runs.compare import RunTable


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="Folders to search for runs. Default: the current folder."),
    ] = None,
    sort: SortOption = None,
    reverse: ReverseOption = False,
    as_json: JsonOption = False,
    html: TableOption = None,
) -> None:
    """Compare recipes and results of finished and running runs."""
    from graftlm.runs.compare import compare

    show_runs(compare(folders or [Path()]), sort, reverse, as_json, html)


def show_runs(
    found: "RunTable", sort: str | None, reverse: bool, as_json: bool, html: Path | None, **more: Any
) -> None:
    """The table, or JSON with `more` beside it; the page too, where one is asked for."""
    from graftlm.runs import compare

    rows = found.rows(sort, reverse=reverse)
    if html:
        from graftlm.files import writing

        with writing(html):
            html.write_text(compare.html(found, rows, title=f"{len(rows)} runs"), encoding="utf-8")
        wrote(html)
    if as_json:
        print_json(compare.to_json(found, sort, reverse=reverse) | more)
        return
    for title, table in (("", rows), ("over seeds: mean +- standard deviation of single runs", found.over_seeds())):
        if table:
            print_table(*compare.cells(table), title=title)
    if not rows:
        print("no run found: a run is a folder with a metrics.jsonl")
    for folder, why in found.damaged.items():
        warn(f"{folder} cannot be read: {why}")
