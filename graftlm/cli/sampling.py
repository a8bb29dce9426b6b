"""The options of `generate` and `chat` as `answer` takes them."""

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import datetime


def sampling_options(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalties: tuple[float, float, float],
    stop: list[str] | None,
) -> dict[str, Any]:
    """How tokens are chosen, as `answer` takes it; what would do nothing is wrong usage. `penalties`: for repetition,
    presence and frequency."""
    from graftlm.generation.sampling import Sampling

    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options |= zip(("repetition_penalty", "presence_penalty", "frequency_penalty"), penalties, strict=True)
    try:
        Sampling(**options)
    except ValueError as error:
        option = "temperature" if "temperature 0" in str(error) else str(error).split()[0].replace("_", "-")
        raise typer.BadParameter(str(error), param_hint=f"--{option}") from None
    if "" in (stop or []):
        raise typer.BadParameter("an empty text would end every answer at once", param_hint="--stop")
    return options | {"stop": stop or ()}


def parse_day(today: str | None) -> "datetime.date | None":
    import datetime

    if today is None:
        return None
    try:
        return datetime.date.today() if today == "now" else datetime.date.fromisoformat(today)
    except ValueError:
        raise typer.BadParameter(f"{today!r} is no date: write YYYY-MM-DD, or now", param_hint="--today") from None
