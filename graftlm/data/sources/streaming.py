"""Mixtures that do not fit into memory: rows of several sources, epoch after epoch, and a cursor to go on from.

    rows = Stream([SourceConfig(path="a.jsonl"), SourceConfig(path="b.jsonl", weight=2.0)], seed=0)
    examples = Examples(rows, renderer, data)
    for example in examples: ...                  # without end
    cursor = examples.cursor()                    # goes through JSON as it is

    rows = Stream([...], seed=0, cursor=cursor["rows"])
    examples = Examples(rows, renderer, data, given=cursor["given"])            # goes on from there

Shares are those of `mixing.py`, and hold at every moment: of t rows a source has had its share, to within a row or so,
and no row of a source has come twice more than another. The sources are read once to be counted, and then in the order
of their files, a block at a time, whose rows are shuffled: so memory is bounded, and rows that stand far apart in a
file do not meet. To go on, a source is read again up to where it was: files know no other way to their middle.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from graftlm.data.batches.pack import Example
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.turn_order import TurnOrder
from graftlm.data.quality.preflight import stream
from graftlm.data.sources.load import stream_rows
from graftlm.data.sources.mixing import apportion, draw_key, masses
from graftlm.data.sources.parts import content_hash
from graftlm.data.sources.records import Problem
from graftlm.data.sources.source import DataConfig, Row, SourceConfig
from graftlm.errors import DataError, nearest, numbered

BLOCK = 4096
"""Rows of a source that are held and shuffled at a time."""

MOST_PROBLEMS = 1_000
"""Rows that cannot be used, by name; all of them are counted."""

Cursor = Mapping[str, Any]


@dataclass(frozen=True)
class Counted:
    """What a first pass finds out about a source."""

    path: str
    content: str
    """SHA-256 of the file; empty where it is none."""
    rows: int
    """That can be used, after the cap."""
    last: str | None
    """With a cap: the highest number, drawn for each row from the seed, of those that are used."""


class Stream:
    """Rows of a mixture without end. It can be iterated over again, and begins where it began.

    Raises DataError where a source has no row that can be used, and where a cursor does not fit the sources.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        temperature: float = 1.0,
        seed: int = 0,
        supervised: bool = True,
        network: bool = False,
        cursor: Cursor | None = None,
        turn_order: TurnOrder = "refuse",
    ) -> None:
        self.sources = list(sources)
        self.seed, self.supervised, self.network = seed, supervised, network
        self.turn_order: TurnOrder = turn_order
        self.problems: list[str] = []
        """The first of the rows that cannot be used; only a stream without a cursor looks for them."""
        self.left_out = 0
        self.unread: dict[tuple[str, str], int] = {}
        """(level, key) of what nobody reads, and how often it occurs; only a stream without a cursor counts."""
        self.start = 0
        """Rows that came before."""
        if cursor is None:
            self.counted = [self._count(number) for number in range(len(self.sources))]
        else:
            self.counted = [Counted(**known) for known in cursor["sources"]]
            self.start = int(cursor["rows"])
            self._check(cursor)
        sizes = [known.rows for known in self.counted]
        self.epoch = sum(sizes)
        """Rows of an epoch."""
        self.owed = apportion(self.epoch, masses(sizes, self.sources, temperature))
        if cursor is not None and cursor["owed"] != self.owed:
            raise DataError(
                f"the cursor is of other weights: an epoch had {cursor['owed']} rows, not {self.owed}",
                code="cursor-mismatch",
            )

    def cursor(self, rows: int) -> dict[str, Any]:
        """Where a stream stands that has given so many rows since it began: plain numbers and strings."""
        sources = [asdict(known) for known in self.counted]
        return {"rows": self.start + rows, "seed": self.seed, "owed": self.owed, "sources": sources}

    def __iter__(self) -> Iterator[Row]:
        epochs, place = divmod(self.start, self.epoch)
        counts = [0] * len(self.sources)
        for source in islice(self._turns(), place):
            counts[source] += 1
        begins = (epochs * owed + rows_given for owed, rows_given in zip(self.owed, counts, strict=True))
        rows = [self._rows(number, begin) for number, begin in enumerate(begins)]
        for source in chain(islice(self._turns(), place, None), _endless(self._turns)):
            yield next(rows[source])

    def _turns(self) -> Iterator[int]:
        """Which source has its turn, for each row of an epoch: the one that is furthest behind its share."""
        behind = [0] * len(self.owed)
        for _ in range(self.epoch):
            behind = [b + owed for b, owed in zip(behind, self.owed, strict=True)]
            # What all are behind adds up to an epoch, so the furthest still owes a row: none is ever taken too often.
            furthest = max(range(len(behind)), key=behind.__getitem__)
            behind[furthest] -= self.epoch
            yield furthest

    def _rows(self, number: int, begin: int) -> Iterator[Row]:
        """The rows of a source without end, from the one that has this number among them."""
        size = self.counted[number].rows
        passes, place = divmod(begin, size) if size else (0, 0)
        while True:
            found = self._usable(number, self.counted[number].last, epoch=passes)
            whole = place - place % BLOCK
            seen = sum(1 for _ in islice(found, whole))
            place -= whole
            while block := list(islice(found, BLOCK)):
                seen += len(block)
                order = np.random.default_rng((self.seed, number, passes, seen)).permutation(len(block))
                yield from (block[i] for i in order[place:].tolist())
                place = 0
            if seen != size:
                raise DataError(
                    f"{self.sources[number].path}: had {size:,} rows and now has {seen:,}: it was changed",
                    code="file-changed",
                )
            passes += 1

    def _usable(
        self,
        number: int,
        last: str | None,
        on_problem: Callable[[Problem], None] = lambda problem: None,
        epoch: int = 0,
    ) -> Iterator[Row]:
        """The rows of one pass over a source, those with a higher number than `last` left out."""
        how: dict[str, Any] = {
            "network": self.network,
            "turn_order": self.turn_order,
            "seed": self.seed,
            "epoch": epoch,
        }
        for found in stream_rows(self.sources[number], **how):
            if isinstance(found, Problem):
                on_problem(found)
            elif self.supervised and found.desirable is False:
                continue
            elif last is None or self._draw_key(number, found) <= last:
                yield found

    def _draw_key(self, number: int, row: Row) -> str:
        return draw_key(self.seed, f"cap {number}", row).hex()

    def _count(self, number: int) -> Counted:
        source = self.sources[number]
        found = map(self._seen, self._usable(number, None, self._note))
        if source.cap is None:
            rows, last = sum(1 for _ in found), None
        else:
            lowest = heapq.nsmallest(source.cap, map(partial(self._draw_key, number), found))
            rows, last = len(lowest), max(lowest, default=None)
        if not rows:
            raise DataError(f"{source.path}: no row can be used\n{numbered(self.problems)}", code="unusable-rows")
        return Counted(source.path, content_hash(source.path) or "", rows, last)

    def _seen(self, row: Row) -> Row:
        for level_and_key in row.unread:
            self.unread[level_and_key] = self.unread.get(level_and_key, 0) + 1
        return row

    def _note(self, problem: Problem) -> None:
        if problem.left_out:
            self.left_out += 1
            if len(self.problems) < MOST_PROBLEMS:
                self.problems.append(str(problem))

    def _check(self, cursor: Cursor) -> None:
        if cursor["seed"] != self.seed:
            raise DataError(
                f"the cursor is of a stream with seed {cursor['seed']}, this one has {self.seed}",
                code="cursor-mismatch",
            )
        paths, known = [source.path for source in self.sources], [each.path for each in self.counted]
        if paths != known:
            other = next(iter({*paths} ^ {*known}), "")
            raise DataError(
                f"the cursor is of other sources: {known}, not {paths}. {nearest(other, known)}", code="cursor-mismatch"
            )
        for each in self.counted:
            if (content_hash(each.path) or "") != each.content:
                raise DataError(
                    f"{each.path}: was changed since the cursor was taken, so it leads to other rows",
                    code="file-changed",
                )


class Examples:
    """The examples of a stream of rows, without end, and where in it they stand."""

    def __init__(
        self,
        rows: Stream,
        renderer: Renderer,
        data: DataConfig,
        *,
        workers: int | None = None,
        given: int = 0,
    ) -> None:
        """`given` leaves out so many, which were given since the stream's first row."""
        self.rows, self.renderer, self.data, self.workers = rows, renderer, data, workers
        self._skip = given
        self._rows_done = 0
        self._examples_given = given

    def cursor(self) -> dict[str, Any]:
        """Where it stands, as plain numbers and strings: `rows` for a Stream, and `given` for the Examples over it."""
        return {"rows": self.rows.cursor(self._rows_done), "given": self._examples_given}

    def __iter__(self) -> Iterator[Example]:
        skip, self._rows_done, self._examples_given = self._skip, 0, 0
        for example in stream(self.rows, self.renderer, self.data, workers=self.workers, done=self._on_rows_done):
            self._examples_given += 1
            if self._rows_done or self._examples_given > skip:
                yield example

    def _on_rows_done(self, rows: int) -> None:
        """All examples of so many rows have been given."""
        self._rows_done, self._examples_given = rows, 0


def _endless(turns: Callable[[], Iterator[int]]) -> Iterator[int]:
    while True:
        yield from turns()
