"""Options and arguments that several commands have."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from graftlm.errors import nearest

BaseOption = Annotated[str, typer.Option("--base", help="smollm2, a folder, a .gguf file or a hub id.")]
AdapterOption = Annotated[
    list[Path] | None, typer.Option("--adapter", help="An adapter folder, ours or PEFT's; several act in this order.")
]
StoreOption = Annotated[
    str | None, typer.Option("--store", help="How the base is kept: auto, fp32, bf16, fp16, int8, nf4 or int4.")
]
NetworkOption = Annotated[bool, typer.Option("--network", help="Allow a base to be fetched from the hub.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Sample among so many likeliest tokens; 0: all.")]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample among the likeliest tokens with this probability.")
]
MinPOption = Annotated[
    float,
    typer.Option("--min-p", min=0.0, max=1.0, help="Leave out tokens with less than this share of the likeliest's."),
]
PenaltyOption = Annotated[
    float,
    typer.Option("--repetition-penalty", min=0.01, help="Above 1: tokens that were there already are less likely."),
]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", help="End the answer before this text; repeat the option for several.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="For sampling at a temperature above 0.")]
TodayOption = Annotated[
    str | None,
    typer.Option(
        "--today",
        metavar="DATE",
        help="For chat templates that write the date: YYYY-MM-DD, or now; default the day of the adapter's training.",
    ),
]
RecipeArgument = Annotated[Path, typer.Argument(help="A YAML file: see docs/recipe.md.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]...",
        help="Override keys of the recipe: train.steps=100, policies.0.ratio=4 (entries count from 0).",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
SortOption = Annotated[str | None, typer.Option("--sort", metavar="COLUMN", help="Order the rows by this column.")]
ReverseOption = Annotated[bool, typer.Option("--reverse", help="Largest first.")]
TableOption = Annotated[
    Path | None, typer.Option("--html", help="Write a page with the table and the loss of every step.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="fp32, or bf16: half the size, and rounding is reported.")]


def check_choice(value: str, known: Iterable[str], option: str) -> str:
    """The value; wrong usage where it is none of `known`."""
    if value not in known:
        raise typer.BadParameter(f"unknown value {value!r}. {nearest(value, known)}", param_hint=option)
    return value
