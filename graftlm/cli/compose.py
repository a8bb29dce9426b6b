"""`graft compose`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm.cli.options import JsonOption, NetworkOption
from graftlm.cli.terminal import note, prepare_libraries, print_json, warn, wrote

if TYPE_CHECKING:
    from graftlm.combine.config import ComposeConfig, Result

RECIPE = "compose.yaml"
"""The file in the result that makes it again."""


def compose(
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", help="Adapter folders, graftlm's or PEFT's; or one recipe (.yaml)."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Adapter folder to write.")],
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            help="Rule: linear, svd, ties, dare, della, breadcrumbs, magnitude, negation, slerp, karcher, model-stock, "
            "sce, tsv, iso-c, wudi, lego, ziplora, lorahub, cat, peft-linear or, in Python only, regmean. "
            "Default: linear.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W,...", help="A weight for each adapter, e.g. 1,0.5,-1. Default: 1 each."),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(
            "--search",
            metavar="ROWS",
            help="Find the weights with the lowest loss on a few of these rows, for linear, lorahub and cat.",
        ),
    ] = None,
    examples: Annotated[
        int | None, typer.Option("--examples", min=1, help="How many rows --search draws. Default: 5.")
    ] = None,
    evaluations: Annotated[
        int | None,
        typer.Option("--evaluations", min=1, help="How often --search computes the loss, at most. Default: 40."),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            "--space",
            help="What the rule acts on: core (small matrices in a common basis), knots, ctm (of one rank), product "
            "(whole matrices) or factors (A and B apart, as PEFT does). Default: core for most rules.",
        ),
    ] = None,
    convention: Annotated[
        str | None,
        typer.Option("--convention", help="Where sources of a rule differ: paper, peft or mergekit. Default: paper."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", help="Share of the entries that a rule keeps: short for --set density=."),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of the rule, e.g. majority=frequency. Repeatable."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Largest rank of the result at a layer. Default: as large as it takes."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Random seed of dare, della and --search.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base of the adapters. Default: the one that the first adapter names."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    as_json: JsonOption = False,
    network: NetworkOption = False,
) -> None:
    """Compose several adapters of one base into one LoRA adapter.

    The folder holds the recipe too (compose.yaml): `graft compose DIR/compose.yaml --out AGAIN` makes it again.
    """
    # Over 60 lines: its signature is the list of options, with the help of each.
    from graftlm.adapters.folder import check_new_folder, new_folder
    from graftlm.combine.config import run
    from graftlm.config.schema import to_yaml

    prepare_libraries()
    check_new_folder(out, overwrite=overwrite)
    config = _config(
        adapters,
        {"weights": weights, "space": space, "convention": convention, "rank": rank, "seed": seed, "base": base},
        {"rows": search, "examples": examples, "evaluations": evaluations},
        by,
        [*(options or []), *([] if density is None else [f"density={density}"])],
        network,
    )
    made = run(config)
    found = _found(config, made)
    with new_folder(out, overwrite=overwrite) as folder:
        made.composition.adapter.write_into(folder)
        (folder / RECIPE).write_text("".join(f"# {line}\n" for line in found) + to_yaml(made.config), encoding="utf-8")
    for text in made.composition.notes:
        warn(f"warning: {text}")
    if as_json:
        sites = {name: report._asdict() for name, report in made.composition.sites.items()}
        print_json({"out": str(out), "sites": sites} | ({"search": made.found._asdict()} if made.found else {}))
    else:
        for line in found:
            note(line)
        _say(made)
        wrote(out)


def _config(
    adapters: list[Path],
    given: dict[str, Any],
    search: dict[str, Any],
    by: str | None,
    options: list[str],
    network: bool,
) -> "ComposeConfig":
    """The recipe of a file with the options laid over it, or that of the options alone."""
    from graftlm.combine.config import ComposeConfig
    from graftlm.config.schema import build
    from graftlm.config.source import lay_over, read_tree
    from graftlm.config.trees import Key

    source, lines = "command line", dict[Key, int]()
    tree: dict[str, Any] = {"adapters": [str(folder) for folder in adapters]}
    if len(adapters) == 1 and adapters[0].suffix in (".yaml", ".yml"):
        source = str(adapters[0])
        tree, lines = read_tree(adapters[0])
    tree |= {key: value for key, value in given.items() if value is not None}
    if isinstance(tree.get("weights"), str):
        tree["weights"] = _numbers(tree["weights"])
    if search := {key: value for key, value in search.items() if value is not None}:
        tree["search"] = (tree.get("search") or {}) | search
        if "rows" not in tree["search"]:
            raise typer.BadParameter(
                "they are for the rows of a search: give these too (--search ROWS)",
                param_hint=" and ".join(f"--{key}" for key in search),
            )
    if by is not None:
        tree["by"] = by
    if options:
        rule = tree.get("by", "linear")
        tree["by"] = {"name": rule} if isinstance(rule, str) else dict(rule)
        lay_over(tree["by"], options)
    if network:
        tree["network"] = True
    return build(ComposeConfig, tree, source=source, lines=lines)


def _numbers(text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers such as 1,0.5,-1, got {text!r}", param_hint="--weights") from None


def _found(config: "ComposeConfig", made: "Result") -> list[str]:
    """The search for the weights in a few lines; empty if the weights were given."""
    found = made.found
    if found is None or config.search is None:
        return []
    how = [
        f"{made.rows} rows of {config.search.rows}",
        f"by {found.by}, {found.evaluations} evaluations, seed {config.seed}",
    ]
    if isinstance(found.weights, dict):
        lines = [f"weights of {len(found.weights)} layers, found on {how[0]}", how[1]]
        return [*lines, f"loss: {found.value:.4f} nats per token, {found.start:.4f} with the mean of the adapters"]
    return [
        f"weights {', '.join(f'{weight:.3f}' for weight in found.weights)}, found on {how[0]}",
        how[1],
        f"loss with penalty: {found.value:.4f} nats per token, {found.start:.4f} with weights 0",
    ]


def _say(made: "Result") -> None:
    """Print the rule, the ranks and the largest errors of the result."""
    config, reports = made.config, made.composition.sites
    ranks = sorted({report.rank for report in reports.values()})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    note(f"{config.by.name}: {len(config.adapters)} adapters, {len(reports)} layers, rank {shown}")
    worst = max(reports, key=lambda site: reports[site].error)
    if reports[worst].error > 0:
        note(f"not exact: {reports[worst].error:.1%} of the change of {worst} is left out, the worst layer")
    if crossed := {site: report.cross_share for site, report in reports.items() if report.cross_share is not None}:
        most = max(crossed, key=lambda site: crossed[site] or 0.0)
        note(f"not the weighted sum: {crossed[most]:.0%} of the change of {most} is something else, the largest share")
