"""Rows against the positions of their base: what has learned positions cannot go beyond them, and what computes its
positions (RoPE, ALiBi) was not trained beyond those that its config names."""

from collections.abc import Sequence

from graftlm.data.batches.pack import Example, Group
from graftlm.data.quality.report import Report
from graftlm.errors import DataError, numbered
from graftlm.hub.config import BaseConfig
from graftlm.hub.sketch import Positions, positions


def check_positions(
    base: str | BaseConfig,
    items: Sequence[Example | Group],
    report: Report,
    *,
    network: bool = False,
    what: str = "rows",
    room: int = 0,
) -> Positions:
    """The positions of the base. Rows that are longer with `room` more tokens each are a note in the report.

    Raises DataError for such rows where the base has a table of positions.
    """
    found = positions(base, network=network)
    if found.count is None:
        return found
    longer = [answer for item in items for answer in item.answers if len(answer) + room > found.count]
    if not longer:
        return found
    longest = max(longer, key=len)
    suffix = f" with the {room} tokens of an answer" if room else ""
    message = (
        f"{len(longer):,} {what} are longer{suffix} than the {found.count:,} positions of the base; the longest has "
        f"{len(longest) + room:,} tokens"
    )
    cure = f"data.max_tokens={found.count} drops such rows, and data.over_length=truncate cuts them"
    if found.are_a_table():
        rows = [f"{answer.where}: {len(answer) + room:,} tokens" for answer in longer]
        raise DataError(
            f"{message}, and it has learned no others: {cure}\n{numbered(rows)}", code="beyond-learned-positions"
        )
    report.notes.append(f"{message} ({longest.where}), and it was not trained beyond them: {cure}")
    return found
