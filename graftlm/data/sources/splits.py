"""Which rows a loss can use, and which of them are held out."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from graftlm.data.sources.formats import TEXT
from graftlm.data.sources.source import Row
from graftlm.errors import DataError


def for_supervised(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """(the rows whose answers should be imitated, notes on the others)"""
    if rows and not any(message.role in ("assistant", TEXT) for row in rows for message in row.messages):
        raise DataError(
            "the rows only ask, and loss `supervised` needs answers to imitate: give rows with answers, or let the "
            "model answer by itself with `rl` in a recipe",
            code="rows-without-answers",
        )
    liked = [row for row in rows if row.desirable is not False]
    if not liked:
        raise DataError(
            "every answer is marked as not liked: loss `supervised` would train the model to give them",
            code="no-desirable-answers",
        )
    notes = []
    if len(liked) < len(rows):
        notes.append(f"{len(rows) - len(liked)} rows whose answer was not liked are left out by loss `supervised`")
    if pairs := sum(bool(row.rejected) for row in liked):
        notes.append(f"{pairs} rows have rejected answers, which loss `supervised` does not use: it trains the chosen")
    return liked, notes


def every_row(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """All rows, where their use is not known."""
    return list(rows), []


def split(rows: Sequence[Row], held_out: int | float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held out): whole groups in an order drawn from the seed are held out until there are enough rows.

    Exactly `held_out` rows (or that share, and then at least one) are kept; chosen rows that are too many are on
    neither side. Groups of more than a tenth of what is wanted come last, so that the held-out rows are not all of one
    kind.
    """
    needs = held_out if isinstance(held_out, int) else max(1, round(held_out * len(rows))) if held_out else 0
    if needs == 0:
        return list(rows), []
    sizes = Counter(row.group for row in rows)
    draws = {group: hashlib.sha256(f"{seed}:{group}".encode()).digest() for group in sizes}
    order = sorted(sizes, key=lambda group: (sizes[group] > max(1, needs // 10), draws[group]))
    held_out_groups: set[str] = set()
    count = 0
    for group in order:
        if count >= needs:
            break
        held_out_groups.add(group)
        count += sizes[group]
    train = [row for row in rows if row.group not in held_out_groups]
    if count < needs or not train:
        raise DataError(
            f"held_out: {needs} of {len(rows)} rows in {len(sizes)} groups leave nothing to train on: hold out fewer, "
            "or make smaller groups (a row's `group`, or else its first question, is never on both sides)",
            code="held-out-too-large",
        )
    return train, [row for row in rows if row.group in held_out_groups][:needs]
