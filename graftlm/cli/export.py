"""`graft export`."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.models import load_model, stop_ids
from graftlm.cli.options import (
    BaseDtypeOption,
    BaseOption,
    JsonOption,
    MergedDtypeOption,
    NetworkOption,
    QuantizationOption,
    check_choice,
)
from graftlm.cli.terminal import print_json, warn


def export(
    adapter: Annotated[Path, typer.Argument(metavar="DIR", help="Adapter folder, graftlm's or PEFT's.")],
    to: Annotated[str, typer.Option("--to", help="Format: peft, plain-lora, merged, gguf or delta.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.")],
    base: BaseOption = "smollm2",
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", min=1, help="Rank of the SVD approximation, for methods without an exact low-rank form."
        ),
    ] = None,
    dtype: MergedDtypeOption = "float32",
    as_json: JsonOption = False,
    base_dtype: BaseDtypeOption = None,
    quantization: QuantizationOption = None,
    network: NetworkOption = False,
) -> None:
    """Export an adapter to another format and list the servers that accept it."""
    from graftlm.adapters.export.export import EXPORTS, export
    from graftlm.adapters.export.lint import lint, to_json
    from graftlm.adapters.export.warnings import export_warnings
    from graftlm.hub.dtypes import DTYPES

    check_choice(to, EXPORTS, "--to")
    model, tokenizer = load_model(base, [adapter], network, base_dtype, quantization)
    ends = stop_ids(tokenizer)
    made = export(model, out, to=to, rank=rank, dtype=DTYPES[dtype], tokenizer=tokenizer, stop_ids=ends)
    verdicts = lint(out)
    if as_json:
        print_json(made | {"servers": to_json(verdicts)})
        return
    if "errors" in made and not made["exact"]:
        worst = max(made["errors"], key=made["errors"].get)
        print(f"not exact: rank {made['rank']} leaves out {made['errors'][worst]:.1%} of {worst}, the worst layer")
    for text in export_warnings(made, dtype):
        warn(f"warning: {text}")
    for verdict in verdicts:
        print(f"{verdict.server:14}{'yes' if verdict.accepts else 'no':5}{'; '.join(verdict.why)}")
