"""`graft merge`."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.models import load_model, stop_ids
from graftlm.cli.options import BaseDtypeOption, BaseOption, MergedDtypeOption, NetworkOption, QuantizationOption
from graftlm.cli.terminal import warn, wrote


def merge(
    adapter: Annotated[
        list[Path],
        typer.Option("--adapter", help="Adapter folder. Repeat the option; adapters are applied in this order."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.")],
    base: BaseOption = "smollm2",
    dtype: MergedDtypeOption = "float32",
    base_dtype: BaseDtypeOption = None,
    quantization: QuantizationOption = None,
    network: NetworkOption = False,
) -> None:
    """Merge adapters into the base and write the model.

    The result needs neither graftlm nor PEFT.
    """
    from graftlm.adapters.export.export import export
    from graftlm.adapters.export.warnings import export_warnings
    from graftlm.hub.dtypes import DTYPES

    model, tokenizer = load_model(base, adapter, network, base_dtype, quantization)
    ends = stop_ids(tokenizer)
    result = export(model, out, to="merged", dtype=DTYPES[dtype], tokenizer=tokenizer, stop_ids=ends)
    for text in export_warnings(result, dtype):
        warn(f"warning: {text}")
    wrote(out)
