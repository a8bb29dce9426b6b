"""`graft methods`."""

from typing import Annotated, Any

import typer

from graftlm.cli.options import JsonOption
from graftlm.cli.terminal import print_json, print_table


def methods(
    wanted: Annotated[
        str | None,
        typer.Option("--for", help="Suggest methods for: quality, memory, speed, size, forgetting, serving, merging."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the methods with their properties and benchmark results."""
    from graftlm.planning.advice import facts, suggest

    rows = facts() if wanted is None else suggest(wanted)
    if as_json:
        print_json(rows)
        return
    about = METHOD_COLUMNS if wanted is None else CHOSEN_COLUMNS
    columns = {key: heading for key, heading in about.items() if any(row.get(key) is not None for row in rows)}
    print_table(list(columns.values()), [[_short(row.get(key)) for key in columns] for row in rows])


METHOD_COLUMNS = {
    "name": "method",
    "mergeable": "merges",
    "factors": "is LoRA",
    "peft_type": "in PEFT",
    "learning_rate": "rate",
    "parameters_trained": "parameters",
    "held_out_loss": "held-out loss",
    "rouge_l": "ROUGE-L",
    "forgotten": "forgotten",
    "step_ratio": "step / LoRA's",
    "peak_over_lora_gib": "GiB over LoRA's",
}


CHOSEN_COLUMNS = {key: METHOD_COLUMNS[key] for key in ("name", "held_out_loss", "forgotten", "step_ratio")} | {
    "why": "why"
}
"""What the table shows of a method's facts; `--json` prints all of them."""


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)
