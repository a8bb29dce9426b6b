"""`graft inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftlm.cli.options import JsonOption, NetworkOption
from graftlm.cli.terminal import prepare_libraries, print_json, print_table

if TYPE_CHECKING:
    from graftlm.combine.inspect import Inspection


def inspect(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="A [B]", help="Adapter folder, graftlm's or PEFT's; or two, to compare.")
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base of the adapters. Default: the one that the first adapter names."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Show so many layers, those that moved most.")] = 10,
    as_json: JsonOption = False,
    network: NetworkOption = False,
) -> None:
    """Show what an adapter changes, layer by layer: norms, singular values, effective rank.

    With two adapters also how much their changes have in common: cosine and overlap of subspaces.
    """
    from graftlm.adapters.adapter import Adapter
    from graftlm.adapters.load import load_named_base
    from graftlm.combine.inspect import inspect as look
    from graftlm.hub.load import load_base

    prepare_libraries()
    members = [Adapter.read(folder) for folder in adapters]
    if base is not None:
        loaded = load_base(base, network=network)
    else:
        first = members[0]
        named = (first.base or {}).get("name") or first.peft_config.get("base_model_name_or_path") or "smollm2"
        loaded = load_named_base(str(named), str(first.where), network=network)
    found = look(loaded.model, members)
    if as_json:
        print_json(found.to_json())
        return
    for number in range(len(adapters)):
        _show(found, number, top)
    if len(adapters) == 2:
        _show_overlaps(found, top)


def _show(found: "Inspection", number: int, top: int) -> None:
    rows = [
        [
            each.site,
            f"{each.norm:.3g}",
            f"{each.relative:.2%}",
            f"{each.spectral_norm:.3g}",
            f"{each.effective_rank:.2f} of {each.rank}",
            f"{each.stable_rank:.2f}",
        ]
        for each in found.moved_most(number, top)
    ]
    title = f"{found.adapters[number]}: {len(found.sites[number])} layers, those that moved most"
    print_table(
        ["layer", "norm", "of the layer's", "largest singular value", "effective rank", "stable rank"], rows, title
    )


def _show_overlaps(found: "Inspection", top: int) -> None:
    most = sorted(found.overlaps, key=lambda each: -abs(each.cosine))[:top]
    rows = [
        [
            each.site,
            f"{each.cosine:+.3f}",
            f"{each.output:.3f} ({each.output_by_chance:.3f} by chance)",
            f"{each.input:.3f} ({each.input_by_chance:.3f} by chance)",
        ]
        for each in most
    ]
    whole = "" if found.cosine is None else f"; cosine of the whole changes {found.cosine:+.3f}"
    title = f"in common: {len(found.overlaps)} layers{whole}"
    print_table(["layer", "cosine", "overlap of outputs", "overlap of inputs"], rows, title)
