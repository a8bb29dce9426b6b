"""The options of `generate` and `chat` as `answer` takes them."""

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import datetime


def sampling_options(
    temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float, stop: list[str] | None
) -> dict[str, Any]:
    """How tokens are chosen, as `answer` takes it; what would do nothing is wrong usage."""
    from graftlm.generation.generate import check_sampling

    try:
        check_sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--temperature") from None
    if "" in (stop or []):
        raise typer.BadParameter("an empty text would end every answer at once", param_hint="--stop")
    chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return chosen | {"repetition_penalty": repetition_penalty, "stop": stop or ()}


def parse_day(today: str | None) -> "datetime.date | None":
    import datetime

    if today is None:
        return None
    try:
        return datetime.date.today() if today == "now" else datetime.date.fromisoformat(today)
    except ValueError:
        raise typer.BadParameter(f"{today!r} is no date: write YYYY-MM-DD, or now", param_hint="--today") from None
