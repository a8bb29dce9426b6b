"""Options and arguments that several commands have."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from graftlm.errors import nearest

BaseOption = Annotated[str, typer.Option("--base", help="Base model: smollm2, a folder, a .gguf file or a hub id.")]
AdapterOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter", help="Adapter folder, graftlm's or PEFT's. Repeat the option; adapters are applied in this order."
    ),
]


def check_choice(value: str, known: Iterable[str], option: str | None = None) -> str:
    """The value; wrong usage where it is none of `known`. Callbacks of options leave `option`, its name, out."""
    if value not in known:
        raise typer.BadParameter(f"unknown value {value!r}. {nearest(value, known)}", param_hint=option)
    return value


def _base_dtype(value: str | None) -> str | None:
    from graftlm.config.dtypes import DTYPES, long_dtype

    return value and check_choice(long_dtype(value), DTYPES)


def _merged_dtype(value: str) -> str:
    from graftlm.config.dtypes import long_dtype

    return check_choice(long_dtype(value), ("float32", "bfloat16"))


def _quantization(value: str | None) -> str | None:
    from graftlm.config.dtypes import QUANTIZATIONS

    return value and check_choice(value, QUANTIZATIONS)


_BASE_DTYPE = "Dtype of the base weights: auto, float32, bfloat16 or float16. Default: auto."
DtypeOption = Annotated[str | None, typer.Option("--dtype", help=_BASE_DTYPE, callback=_base_dtype)]
BaseDtypeOption = Annotated[str | None, typer.Option("--base-dtype", help=_BASE_DTYPE, callback=_base_dtype)]
MergedDtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Dtype of the merged weights: float32, or bfloat16 (half the size; the rounding error is reported).",
        callback=_merged_dtype,
    ),
]
QuantizationOption = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        help="Quantization of the base weights: none, int8, int4 or nf4. Default: none.",
        callback=_quantization,
    ),
]
NetworkOption = Annotated[bool, typer.Option("--network", help="Allow downloads from the Hugging Face hub.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum length of the answer, in tokens.")]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 is greedy decoding.")
]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Sample from the K most likely tokens; 0: from all.")]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        help="Sample from the smallest set of tokens with this total probability (nucleus).",
    ),
]
MinPOption = Annotated[
    float,
    typer.Option(
        "--min-p", min=0.0, max=1.0, help="Exclude tokens whose probability is below this share of the largest one."
    ),
]
PenaltyOption = Annotated[
    float,
    typer.Option("--repetition-penalty", min=0.01, help="Above 1: tokens that occurred already become less likely."),
]
PresenceOption = Annotated[
    float,
    typer.Option(
        "--presence-penalty", min=-2, max=2, help="Taken off the logits of tokens that occurred in the answer."
    ),
]
FrequencyOption = Annotated[
    float,
    typer.Option("--frequency-penalty", min=-2, max=2, help="The same, as often as the token occurred in the answer."),
]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", help="End the answer before this text. Repeat the option for several.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Random seed for sampling.")]
TodayOption = Annotated[
    str | None,
    typer.Option(
        "--today",
        metavar="DATE",
        help="Date for chat templates that write one: YYYY-MM-DD or now. Default: the day the adapter was trained.",
    ),
]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe, a YAML file: see docs/recipe.md.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value",
        help="Overrides, e.g. train.steps=100 or callbacks.0.ratio=4 (list entries count from 0).",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SortOption = Annotated[str | None, typer.Option("--sort", metavar="COLUMN", help="Sort the table by this column.")]
ReverseOption = Annotated[bool, typer.Option("--reverse", help="Sort in descending order.")]
TableOption = Annotated[
    Path | None, typer.Option("--html", help="Write an HTML page with the table and the loss curves.")
]
