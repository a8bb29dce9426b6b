"""`graft transfer`."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.options import NetworkOption, OverridesArgument
from graftlm.cli.terminal import note, prepare_libraries


def transfer(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder, graftlm's or PEFT's.")],
    to: Annotated[str, typer.Option("--to", help="Base to transfer to: smollm2, a folder, a .gguf file or a hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Adapter folder to write; the rows lie in OUT.rows.jsonl.")],
    overrides: OverridesArgument = None,
    rows: Annotated[
        str | None, typer.Option("--rows", help="Rows of the task: their questions are the seeds, 5 or more are best.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Text file with questions of the task, one a line, as seeds.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base of the adapter. Default: the one that it names.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Rows to make.")] = 200,
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", min=1, help="Longest answer; those that do not end are left out.")
    ] = 256,
    no_filter: Annotated[
        bool, typer.Option("--no-filter", help="Keep answers of which the adapter is less sure than of the seeds'.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed of the questions.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace folder and rows.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run from its last checkpoint, if there is one.")
    ] = False,
    network: NetworkOption = False,
) -> None:
    """Make an adapter anew for another base, from rows that it makes itself (Trans-LoRA).

    Overrides are of the recipe of the run on the target, e.g. delta.r=8. Rows that were made with the same settings are
    used again.

    Exit codes: 0 success, 1 error, 2 wrong usage, 75 stopped (resume with --resume), 130 interrupted.
    """
    # Over 60 lines: its signature is the list of options, with the help of each.
    from rich.console import Console

    from graftlm.display.terminal import progress
    from graftlm.library.synthesis import SynthesisConfig, read_seeds
    from graftlm.library.transfer import make_rows, recipe_for, train_on
    from graftlm.run import RESUMABLE

    if (rows is None) == (prompts is None):
        raise typer.BadParameter("give seeds, by --rows or by --prompts", param_hint="--rows")
    prepare_libraries()
    seeds = read_seeds(rows, prompts)
    config = SynthesisConfig(rows=count, answer_tokens=answer_tokens, filter=not no_filter, seed=seed)
    recipe = recipe_for(adapter, to, out, overrides or [], network=network)
    with progress(Console(stderr=True)) as bars:
        bar = bars.add_task("rows", total=count, now="")
        made = make_rows(
            adapter,
            recipe,
            seeds,
            out,
            base=base,
            synthesis=config,
            overwrite=overwrite,
            resume=resume,
            progress=lambda done, total: bars.update(bar, completed=done),
        )
    counts = made.facts["counts"]
    note(f"{counts['kept']} rows in {made.rows}, made of {counts['written']} questions{' before' * made.reused}")
    result = train_on(made, recipe, out, overwrite=overwrite, resume=resume, console=Console())
    if result.summary.get("interrupted"):
        raise typer.Exit(RESUMABLE)
