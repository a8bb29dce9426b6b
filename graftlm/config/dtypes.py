"""The keys `dtype` and `quantization` of a base, a teacher and a reward model: their values, and their spellings."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Short spelling of a dtype -> torch's name of it."""


def long_dtype(name: Any) -> Any:
    """torch's name of a dtype that may be spelled short; what is no such spelling, as it is."""
    return SHORT.get(name, name) if isinstance(name, str) else name


DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Dtype = Annotated[DtypeName, BeforeValidator(long_dtype)]
"""The dtype of a model's weights, normalized to torch's name."""
Quantization = Literal["none", "int8", "int4", "nf4"]
DTYPES: tuple[str, ...] = get_args(DtypeName)
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)


def split_store(value: object) -> tuple[str, str] | None:
    """(key, value) of today for a value of the key `store` of earlier versions; None for no value that it had."""
    if (name := long_dtype(value)) in DTYPES:
        return "dtype", str(name)
    return ("quantization", str(value)) if value in QUANTIZATIONS[1:] else None


def instead_of_store(section: str, prefix: str = "") -> Callable[[object], str]:
    """What to answer to a key `store` of this section: from its value, what to write now.

    `prefix` begins the names of the keys.
    """

    def answer(value: object) -> str:
        keys = f"{prefix}dtype and {prefix}quantization"
        found = split_store(value)
        if found is None:
            return f"{keys} ({', '.join(DTYPES)}; {', '.join(QUANTIZATIONS)})"
        return f"{keys}: write `{section}: {{{prefix}{found[0]}: {found[1]}}}`"

    return answer
