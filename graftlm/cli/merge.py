"""`graft merge`."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.models import load_model, stop_ids, torch_dtype
from graftlm.cli.options import BaseOption, DtypeOption, NetworkOption, StoreOption
from graftlm.cli.terminal import warn, wrote


def merge(
    adapter: Annotated[
        list[Path],
        typer.Option("--adapter", help="Adapter folder. Repeat the option; adapters are applied in this order."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.")],
    base: BaseOption = "smollm2",
    dtype: DtypeOption = "fp32",
    store: StoreOption = None,
    network: NetworkOption = False,
) -> None:
    """Merge adapters into the base and write the model.

    The result needs neither graftlm nor PEFT.
    """
    from graftlm.adapters.export.export import export
    from graftlm.adapters.export.warnings import export_warnings

    wanted = torch_dtype(dtype)
    model, tokenizer = load_model(base, adapter, network, store)
    ends = stop_ids(tokenizer)
    made = export(model, out, to="merged", dtype=wanted, tokenizer=tokenizer, stop_ids=ends)
    for text in export_warnings(made, dtype):
        warn(f"warning: {text}")
    wrote(out)
