"""Counts of every rendered piece of a row, as arrays."""

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from graftlm.data.chat.roles import Role
from graftlm.data.chat.token_columns import Columns

_PROMPT = np.isin(np.arange(256), (Role.SYSTEM, Role.USER, Role.TOOL))


AT_ONCE = 2**20
"""Tokens that are counted at a time."""


@dataclass(frozen=True)
class PieceCounts:
    """Counts of every piece, as arrays [P]; of the tokens within the limit of length, unless a field says otherwise."""

    supervised: NDArray[np.int64]
    prompt: NDArray[np.int64]
    answer: NDArray[np.int64]
    unterminated: NDArray[np.int64]
    ends: NDArray[np.int64]
    """Tokens that end a turn, in the whole piece."""
    ends_beyond: NDArray[np.int64]
    bos: NDArray[np.int64]


def count_pieces(columns: Columns, lengths: NDArray[np.int64], bos: int | None) -> PieceCounts:
    """The counts of all pieces, of some at a time: what is compared on the way then stays in the cache."""
    lots = np.flatnonzero(np.diff(columns.starts // AT_ONCE, prepend=-1)).tolist()
    found = [
        _count_some(columns, slice(first, last), lengths[first:last], bos)
        for first, last in pairwise([*lots, len(lengths)])
    ] or [_count_some(columns, slice(0, 0), lengths, bos)]
    return PieceCounts(*(np.concatenate([getattr(part, f.name) for part in found]) for f in fields(PieceCounts)))


def _count_some(columns: Columns, pieces: slice, lengths: NDArray[np.int64], bos: int | None) -> PieceCounts:
    starts, ends = columns.starts[pieces], columns.ends[pieces]
    begin, end = (int(starts[0]), int(ends[-1])) if len(starts) else (0, 0)
    starts, ends = starts - begin, ends - begin
    ids, roles, is_trained = columns.ids[begin:end], columns.roles[begin:end], columns.weights[begin:end] != 0
    answer, ending = roles == Role.ASSISTANT, roles == Role.END_OF_TURN
    # A trained answer is over where the next token is none of it; that one should be a trained end of turn. What
    # follows the last kept token belongs to another piece or is cut off: nothing follows it.
    goes_on = answer | (ending & is_trained)
    followed = np.zeros(len(roles), np.bool_)
    followed[:-1] = goes_on[1:]
    followed[starts + lengths - 1] = False

    def count(values: NDArray[np.bool_], lengths: NDArray[np.int64] = lengths) -> NDArray[np.int64]:
        return _sums(values, starts, lengths)

    whole = ends - starts
    ends_within = count(ending)
    all_ends = ends_within if np.array_equal(whole, lengths) else count(ending, whole)
    begins = np.zeros(len(starts), np.int64)
    if bos is not None and len(starts):
        second = (ids[np.minimum(starts + 1, ends - 1)] == bos) & (whole > 1)
        begins = (ids[starts] == bos) * (1 + second)
    return PieceCounts(
        supervised=count(is_trained),
        prompt=count(_PROMPT[roles]),
        answer=count(answer),
        unterminated=count(answer & is_trained & ~followed),
        ends=all_ends,
        ends_beyond=all_ends - ends_within,
        bos=begins.astype(np.int64),
    )


def _sums(values: NDArray[np.bool_], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many are true in each values[start : start + length]: int64 [P]."""
    found = np.zeros(len(starts), np.int64)
    some = np.flatnonzero(lengths)  # reduceat has another opinion of what is empty
    if len(some):
        bounds = np.stack([starts[some], (starts + lengths)[some]], 1).ravel()
        bounds = bounds[:-1] if bounds[-1] == len(values) else bounds
        found[some] = np.add.reduceat(values.view(np.uint8), bounds, dtype=np.int64)[::2]
    return found
