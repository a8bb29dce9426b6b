"""`graft init`."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.terminal import note
from graftlm.errors import nearest


def init(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Name of a recipe. Default: list the names.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write. Default: NAME.yaml.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented recipe to start from, or list these recipes."""
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
    note(f"wrote {out}: graft train {out}")
