"""Several sources in one training set: how many rows of each an epoch has, and which.

A source of n rows (after its cap) with weight w has a share of the epoch in proportion to w n^(1/T). T = 1 with all
weights alike is every row once; T = 2 is square-root sampling, large T gives all sources alike (Raffel et al. 2020,
arXiv:1910.10683, section 3.5.2; T with a cap is theirs too). The epoch is as long as all rows together, and exact: of a
source that owes k rows each row comes k // n times, and k % n of them, drawn from the seed, once more.

Nothing is drawn while training runs, so the mixture depends on files, recipe and seed alone.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.data.chat.parallel import lasting
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.records import Problem
from graftlm.data.sources.source import DataConfig, Row, SourceConfig
from graftlm.data.sources.splits import for_supervised, split
from graftlm.errors import DataError


@dataclass(frozen=True)
class Data:
    """The rows of a run, and notes on the files that they come from."""

    train: Sequence[Row]
    held_out: Sequence[Row]
    format: str
    problems: list[str]
    """Rows that are left out: `file:line: reason`."""
    notes: list[str]


@lasting()
def read_data(
    data: DataConfig, *, seed: int, network: bool = False, usable: Callable[..., Any] = for_supervised
) -> Data:
    """Read all sources, hold rows out and mix the others; raises DataError as `load_rows` and `split` do.

    `usable` returns (the rows that the loss can use, notes on the others); it raises DataError where the loss needs
    more.
    """
    all_problems: list[Problem] = []
    sources = data.sources()
    field = data.order.field if data.order else None
    how: dict[str, Any] = {"network": network, "strict": data.strict, "turn_order": data.turn_order, "seed": seed}
    loaded = [load_rows(source, problems=all_problems, score=field, **how) for source in sources]
    rows, notes = usable([row for part, _ in loaded for row in part])
    notes = [*notes, *_templates(sources, [part for part, _ in loaded])]
    if isinstance(data.held_out, int | float):
        rows, held_out = split(rows, data.held_out, seed)
    else:
        held_out, _ = load_rows(data.held_out, problems=all_problems, **how)
        held_out, _ = usable(held_out)
    if len(sources) > 1 or sources[0].cap is not None:
        remaining = {id(row) for row in rows}
        parts = [[row for row in part if id(row) in remaining] for part, _ in loaded]
        rows, shares = mix(parts, sources, temperature=data.mix_temperature, seed=seed)
        notes += shares
    if data.desirable_share is not None:
        rows, note = balance(rows, data.desirable_share, seed=seed)
        notes.append(note)
    problems = [str(problem) for problem in all_problems if problem.left_out]
    notes += [str(problem) for problem in all_problems if not problem.left_out]
    return Data(rows, held_out, ", ".join(dict.fromkeys(name for _, name in loaded)), problems, notes)


def _templates(sources: Sequence[SourceConfig], parts: Sequence[Sequence[Row]]) -> list[str]:
    """How many rows each template asks, a line for each source that has several."""
    lines = []
    for source, rows in zip(sources, parts, strict=True):
        if len(source.templates) > 1:
            counts = Counter(row.template for row in rows)
            count_list = ", ".join(f"{number + 1}: {counts[number]:,} rows" for number in range(len(source.templates)))
            lines.append(f"{source.path}: asked by template {count_list}")
    return lines


def mix(
    parts: Sequence[Sequence[Row]], sources: Sequence[SourceConfig], *, temperature: float, seed: int
) -> tuple[list[Row], list[str]]:
    """The rows of one epoch, source by source in the order of their files, and a line on each source for the report."""
    capped = [
        _sample(rows, source.cap, seed, f"cap {i}") for i, (rows, source) in enumerate(zip(parts, sources, strict=True))
    ]
    sizes = [len(rows) for rows in capped]
    quotas = apportion(sum(sizes), masses(sizes, sources, temperature))
    mixed: list[Row] = []
    notes = []
    for index, (rows, source, count) in enumerate(zip(capped, sources, quotas, strict=True)):
        again, times = _times(rows, count, seed, f"rest {index}")
        mixed += again
        note = f", {len(rows):,} of which are drawn" if len(rows) < len(parts[index]) else ""
        found = f"{len(parts[index]):,}{note}; each comes {times} times"
        notes.append(f"{source.path}: {count:,} rows of an epoch, from {found}")
    return mixed, notes


def balance(rows: Sequence[Row], share: float, *, seed: int) -> tuple[list[Row], str]:
    """The rows of one epoch with this share of liked ones among those with feedback, and a line for the report.

    The epoch is as long as it was, and exact as a mixture is: each liked row comes equally often but for one time, and
    each disliked one. Rows without feedback come once.
    """
    kinds = {flag: [row for row in rows if row.desirable is flag] for flag in (True, False, None)}
    if not kinds[True] or not kinds[False]:
        raise DataError(
            f"data.desirable_share: of the rows {len(kinds[True]):,} are marked as liked and {len(kinds[False]):,} as "
            "not liked: both kinds are needed, and a loss that learns from both",
            code="single-label",
        )
    quotas = apportion(len(kinds[True]) + len(kinds[False]), [share, 1 - share])
    liked, times = _times(kinds[True], quotas[0], seed, "liked")
    other, times_other = _times(kinds[False], quotas[1], seed, "not liked")
    note = (
        f"{quotas[0]:,} liked and {quotas[1]:,} disliked rows of an epoch, from {len(kinds[True]):,} and "
        f"{len(kinds[False]):,}; each comes {times} and {times_other} times"
    )
    return [*liked, *other, *kinds[None]], note


def _times(rows: Sequence[Row], count: int, seed: int, purpose: str) -> tuple[list[Row], str]:
    """`count` rows, each equally often but for one time, in their order; and how often that is."""
    whole, rest = divmod(count, len(rows)) if rows else (0, 0)
    again = {id(row) for row in _sample(rows, rest, seed, purpose)}
    times = f"{whole}" if not rest else f"{whole} or {whole + 1}"
    return [row for row in rows for _ in range(whole + (id(row) in again))], times


def masses(sizes: Sequence[int], sources: Sequence[SourceConfig], temperature: float) -> list[float]:
    """The mass of each source: its share of the mixture is in proportion to it."""
    return [s.weight * n ** (1 / temperature) if n else 0.0 for s, n in zip(sources, sizes, strict=True)]


def apportion(total: int, mass: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `mass` that add up to `total`; what is left goes to the largest remainders."""
    whole = sum(mass)
    if not whole:
        return [0] * len(mass)
    exact = [total * part / whole for part in mass]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(mass)), key=lambda i: counts[i] - exact[i])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _sample(rows: Sequence[Row], count: int | None, seed: int, purpose: str) -> list[Row]:
    """A sample of `count` rows in their order, drawn by their places; all rows where there is no limit."""
    if count is None or count >= len(rows):
        return list(rows)
    order = sorted(range(len(rows)), key=lambda i: draw_key(seed, purpose, rows[i]))
    return [rows[i] for i in sorted(order[:count])]


def draw_key(seed: int, purpose: str, row: Row) -> bytes:
    """The key of a row in a draw: the rows with the lowest keys are drawn.

    It depends on the place of the row in its file and on the row's group, not on the name of the file; `purpose` holds
    the number of the source.
    """
    place = row.where.rpartition("/")[2].partition(":")[2]
    return hashlib.sha256(f"{seed}:{purpose}:{place}:{row.group}".encode("utf-8", "surrogatepass")).digest()
