"""`graft library`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftlm.cli.options import DtypeOption, JsonOption, NetworkOption, QuantizationOption
from graftlm.cli.terminal import note, prepare_libraries, print_json, print_table, warn

if TYPE_CHECKING:
    from graftlm.library.entry import Entry, Score
    from graftlm.library.library import Library
    from graftlm.library.search import ByRows
    from graftlm.library.similarity import Pair, Similarities

DAMAGED = 3
"""Exit code of `graft library verify` where something is wrong."""

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the library.")]
ThresholdOption = Annotated[
    float, typer.Option("--threshold", min=0.0, max=1.0, help="Smallest cosine of two near-duplicates.")
]
LibraryBaseOption = Annotated[
    str | None, typer.Option("--base", help="Base of the adapters. Default: the one that they name.")
]
DeleteOption = Annotated[bool, typer.Option("--delete", help="Delete for good, in place of moving to DIR/.removed.")]


def list_entries(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """List the adapters of a library."""
    from graftlm.config.schema import to_tree
    from graftlm.library.library import read_library

    library = read_library(folder)
    _warn_of(library)
    if as_json:
        print_json({name: to_tree(entry) | {"digest": entry.digest} for name, entry in library.entries.items()})
        return
    columns = ["name", "method", "rank", "sites", "base", "scores", "licence", "description"]
    print_table(columns, [_row(name, entry) for name, entry in library.entries.items()])


def add(
    folder: FolderArgument,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder, graftlm's or PEFT's.")],
    name: Annotated[str | None, typer.Option("--name", help="Its name. Default: that of its folder.")] = None,
    description: Annotated[str | None, typer.Option("--description", help="What it is for.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="Under which licence it may be used.")] = None,
    score: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="NAME=VALUE[:N]", help="A figure of it, over N items. Repeatable."),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option("--examples", metavar="ROWS", help="Rows of its task: up to 20 are copied, for the search."),
    ] = None,
    several_bases: Annotated[
        bool, typer.Option("--several-bases", help="Allow an adapter of another base than the others.")
    ] = False,
) -> None:
    """Copy an adapter into a library, which is made where there is none."""
    from graftlm.library.library import add

    made, remarks = add(
        folder,
        adapter,
        name=name,
        description=description,
        licence=licence,
        scores=dict(_score(each) for each in score or ()),
        examples=[] if examples is None else _examples(examples),
        several_bases=several_bases,
    )
    for remark in remarks:
        warn(remark)
    note(f"added {made} to {folder}")


def verify(
    folder: FolderArgument,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="First make the index agree with the folders: add and take out adapters. Changed files stay findings.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every file of a library by its digest in the index, and the index by the folders.

    Exit codes: 0 as it should be, 1 error, 2 wrong usage, 3 something is wrong.
    """
    from graftlm.library import library

    done = library.repair(folder) if repair else []
    findings = library.verify(folder)
    if as_json:
        print_json({"repaired": done, "findings": [finding._asdict() for finding in findings]})
    else:
        for line in done:
            note(line)
        for finding in findings:
            print(f"{finding.name}: {finding.why}" if finding.name else finding.why)
        if not findings:
            print(f"{folder}: {len(library.read_library(folder).entries)} adapters, as the index has them")
    raise typer.Exit(DAMAGED if findings else 0)


def search(
    folder: FolderArgument,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="Words of name or description.")] = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="Rows of the task, with answers, in place of words.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            help="For --rows: embedding (of the adapters' example rows) or loss (of each adapter on the rows). "
            "Default: embedding where every adapter has example rows, else loss.",
        ),
    ] = None,
    base: LibraryBaseOption = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
    network: NetworkOption = False,
) -> None:
    """Find the adapter for a task, by words or by example rows."""
    from graftlm.library.library import read_library
    from graftlm.library.search import by_rows, by_words

    if (text is None) == (rows is None):
        raise typer.BadParameter("give words (TEXT) or a file of rows (--rows), one of the two")
    if by not in (None, "embedding", "loss"):
        raise typer.BadParameter(f"unknown value {by!r}: embedding or loss", param_hint="--by")
    if rows is None and by is not None:
        raise typer.BadParameter("it is for --rows", param_hint="--by")
    library = read_library(folder)
    _warn_of(library)
    if text is not None:
        found = by_words(library.entries, text)
        if as_json:
            print_json([each._asdict() for each in found])
        else:
            texts = [library.entries[each.name].description or "" for each in found]
            rows_shown = [[each.name, f"{each.value:.2f}", about] for each, about in zip(found, texts, strict=True)]
            print_table(["name", "share of the words", "description"], rows_shown)
        return
    model, tokenizer = _load(library, base, dtype, quantization, network)
    _show_by_rows(by_rows(library, str(rows), model, tokenizer, by=by), as_json)  # type: ignore[arg-type]


def duplicates(
    folder: FolderArgument,
    threshold: ThresholdOption = 0.95,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base, to compare adapters that are no plain LoRA too. Default: plain LoRA alone."),
    ] = None,
    as_json: JsonOption = False,
    network: NetworkOption = False,
) -> None:
    """List near-duplicates: adapters whose changes are one change, however it is written as B A and scaled.

    The overlaps are those of the spaces that the changes write to (left) and read from (right), from 0 to 1.
    """
    _, found, pairs = _compare(folder, threshold, base, network)
    if as_json:
        print_json({"compared": list(found.names), "left_out": dict(found.left_out), "pairs": _trees(pairs)})
        return
    _warn_of_left_out(found)
    _show_pairs(pairs)
    note(f"{len(found.names)} adapters compared, {len(pairs)} pairs with a cosine of {threshold:g} or more")


def prune(
    folder: FolderArgument,
    score: Annotated[
        str | None, typer.Option("--score", help="The score that decides. Default: the only one that there is.")
    ] = None,
    lowest_is_best: Annotated[
        bool, typer.Option("--lowest-is-best", help="A lower score is better, as of a loss.")
    ] = False,
    threshold: ThresholdOption = 0.95,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this, it is shown alone.")] = False,
    delete: DeleteOption = False,
    base: LibraryBaseOption = None,
    network: NetworkOption = False,
) -> None:
    """Take out of each set of near-duplicates all but the best.

    Adapters without the score stay. What is taken out moves to DIR/.removed.
    """
    from graftlm.library.library import remove
    from graftlm.library.similarity import prune, score_named

    library, found, pairs = _compare(folder, threshold, base, network)
    _warn_of_left_out(found)
    name, scores = score_named(library.entries, score)
    plan = prune(pairs, scores, lowest_is_best=lowest_is_best)
    for out, stays in plan.out.items():
        print(f"{out} ({name} {scores[out]:g}) goes, {stays} ({name} {scores[stays]:g}) stays")
    for pair in plan.undecided:
        print(f"{pair.one} and {pair.other} both stay: not both have the score {name}")
    if not plan.out:
        print("nothing to take out")
    elif not yes:
        note("nothing was done: say --yes")
    else:
        _removed(remove(folder, list(plan.out), delete=delete), len(plan.out))


def remove(
    folder: FolderArgument,
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Adapters to take out.")],
    delete: DeleteOption = False,
) -> None:
    """Take adapters out of a library. They move to DIR/.removed."""
    from graftlm.library.library import remove

    _removed(remove(folder, names, delete=delete), len(set(names)))


# Parts of the commands --------------------------------------------------------------------------------------------


def _row(name: str, entry: "Entry") -> list[str]:
    scores = ", ".join(
        f"{key} {one.value:g}" + (f" (n={one.n})" if one.n else "") for key, one in sorted(entry.scores.items())
    )
    ranks = f"{entry.ranks[0]} to {entry.ranks[-1]}" if len(entry.ranks) > 1 else "".join(map(str, entry.ranks))
    known = [entry.base or "", scores, entry.licence or "", entry.description or ""]
    return [name, entry.method, ranks, "" if entry.sites is None else str(entry.sites), *known]


def _score(text: str) -> "tuple[str, Score]":
    """`NAME=VALUE` or `NAME=VALUE:N`."""
    from math import isfinite

    from graftlm.library.entry import Score

    name, _, figure = text.partition("=")
    value, _, count = figure.partition(":")
    try:
        n = int(count) if count else None
        if not name.strip() or not isfinite(float(value)) or (n is not None and n < 1):
            raise ValueError
        return name.strip(), Score(value=float(value), n=n)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: write NAME=VALUE, or NAME=VALUE:N for a figure over N items", param_hint="--score"
        ) from None


def _examples(file: Path) -> list[dict[str, Any]]:
    from graftlm.library.search import example_rows

    return example_rows(file)


def _compare(
    folder: Path, threshold: float, base: str | None, network: bool
) -> "tuple[Library, Similarities, list[Pair]]":
    """The near-duplicates of a library; with a base, all methods that change weight matrices are compared."""
    from graftlm.adapters.adapter import Adapter
    from graftlm.library.library import read_library
    from graftlm.library.similarity import near_duplicates, similarities

    library = read_library(folder)
    _warn_of(library)
    adapters = {name: Adapter.read(library.path(name)) for name in library.entries}
    model = None if base is None else _load(library, base, None, None, network)[0]
    found = similarities(adapters, model)
    several = len(library.bases()) > 1
    bases = {name: entry.base_fingerprint for name, entry in library.entries.items()} if several else None
    return library, found, near_duplicates(found, threshold, bases)


def _load(
    library: "Library", base: str | None, dtype: str | None, quantization: str | None, network: bool
) -> tuple[Any, Any]:
    from graftlm.adapters.load import load_named_base
    from graftlm.hub.load import load_base

    prepare_libraries()
    if base is not None:
        return load_base(base, dtype=dtype, quantization=quantization, network=network)
    named = sorted({entry.base for entry in library.entries.values() if entry.base})
    if len(named) != 1:
        said = f"the adapters name {', '.join(named)}" if named else "no adapter names its base"
        raise typer.BadParameter(f"{said}: say which base it is", param_hint="--base")
    return load_named_base(named[0], str(library.folder), dtype=dtype, quantization=quantization, network=network)


def _show_by_rows(made: "ByRows", as_json: bool) -> None:
    if as_json:
        print_json(made._asdict() | {"found": [each._asdict() for each in made.found]})
        return
    for name, why in made.left_out.items():
        warn(f"{name} is not compared: {why}")
    column = "cosine" if made.by == "embedding" else "loss in nats per token"
    shown = [[each.name, f"{each.value:.4f}"] for each in made.found]
    print_table(["name", column], shown)
    base = "" if made.base_loss is None else f"; the base alone {made.base_loss:.4f}"
    note(f"by {made.by}, on the first {made.rows} rows{base}")


def _trees(pairs: "list[Pair]") -> list[dict[str, Any]]:
    return [pair._asdict() for pair in pairs]


def _show_pairs(pairs: "list[Pair]") -> None:
    if not pairs:
        return
    shown = [[pair.one, pair.other, *(f"{value:.4f}" for value in pair[2:])] for pair in pairs]
    print_table(["one", "other", "cosine", "left overlap", "right overlap", "norm ratio"], shown)


def _removed(moved: list[Path], count: int) -> None:
    for path in moved:
        note(f"moved to {path}")
    note(f"{count} taken out")


def _warn_of(library: "Library") -> None:
    for problem in library.problems:
        warn(f"{library.folder}: {problem}")


def _warn_of_left_out(found: "Similarities") -> None:
    for name, why in found.left_out.items():
        warn(f"{name} is not compared: {why}")
