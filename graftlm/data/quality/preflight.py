"""The pre-flight report: what training will see, said before it starts.

`prepare` renders and masks rows on all cores, applies the over-length policy and refuses rows that would teach nothing;
what it counted on the way is the report. `stream` does the same for rows without end. What the rows themselves look
like (duplicates, languages, refusals) is in `survey.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.data.batches.pack import Example
from graftlm.data.chat import token_cache as token_cache
from graftlm.data.chat.masks import weights
from graftlm.data.chat.parallel import lasting, many, rendered
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.roles import Role
from graftlm.data.chat.token_columns import LOST_THOUGHTS, LOST_TOOLS, MOVED_SYSTEM, UNREAD_VARIABLES, Columns, join
from graftlm.data.quality.survey import Survey, shown_places
from graftlm.data.sources.formats import TEXT
from graftlm.data.sources.row_cache import KeptRows, places, unread_keys
from graftlm.data.sources.source import DataConfig, Row
from graftlm.errors import DataError, numbered

_PROMPT = np.isin(np.arange(256), (Role.SYSTEM, Role.USER, Role.TOOL))

LONG_PROMPTS = 4.0
FEW_ROWS = 2_000
LEAST_ROWS = 100
"""Shi et al. 2024 (arXiv:2405.14394) found that loss over instructions helps where instructions are long against the
answers and where rows are few. They give no threshold; these are ours. Of a handful of rows the lengths say nothing."""

AT_ONCE = 2**20
"""Tokens that are counted at a time."""

OF_ANSWERS = ("supervised", "tokens of an answer", "prompts to answers", "an answer ends with")
"""What is said of rows with answers only."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Lengths:
    """How many rows have how many tokens: `counts[n]` of them have n. Bounded by the longest row, not by the rows."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(1, np.int64)

    def add(self, lengths: NDArray[np.int64]) -> None:
        new = np.bincount(lengths, minlength=len(self.counts)).astype(np.int64)
        new[: len(self.counts)] += self.counts
        self.counts = new

    @property
    def total(self) -> int:
        """Tokens."""
        return int(self.counts @ np.arange(len(self.counts)))

    def quantile(self, share: float) -> int:
        """The least length that so great a share of the rows does not exceed; 0 without rows."""
        wanted = share * self.counts.sum()
        return int(np.searchsorted(np.cumsum(self.counts), wanted)) if wanted else 0

    def histogram(self, most: int = 24) -> tuple[list[int], list[int]]:
        """(edges, rows between each two of them): at most so many bins of equal width, up to the longest row."""
        width = max(1, -(-len(self.counts) // most))
        starts = np.arange(0, len(self.counts), width)
        return [*starts.tolist(), int(starts[-1]) + width], np.add.reduceat(self.counts, starts).tolist()

    def to_json(self) -> dict[str, Any]:
        edges, rows = self.histogram()
        quantiles = {f"{share:.0%}": self.quantile(share) for share in QUANTILES}
        return {"tokens": self.total, "quantiles": quantiles, "edges": edges, "rows": rows}

    def __str__(self) -> str:
        middle, most, longest = (self.quantile(share) for share in (0.5, 0.95, 1.0))
        return f"median {middle:,}, 95 % within {most:,}, longest {longest:,}"


@dataclass
class Report:
    """Counts are of rows and tokens that are kept, unless they say otherwise."""

    format: str = ""
    mask: str = "response"
    max_tokens: int = 0
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest_tokens: int = 0
    longest_row: str = ""
    dropped_over_length: list[str] = field(default_factory=list)
    truncated_over_length: list[str] = field(default_factory=list)
    rows_in_part: list[str] = field(default_factory=list)
    """Conversations that the chat template splits into rows, some of which are left out."""
    truncated_without_end: int = 0
    """Truncated rows whose last answer lost the token that ends it."""
    unterminated: list[str] = field(default_factory=list)
    """Rows with a trained answer after which no end of turn is trained: from these nobody learns to stop."""
    end_of_turn: str = ""
    """What the first answer ends with, as text; empty where the template writes nothing after an answer."""
    end_of_turn_trained: bool = False
    most_bos: int = 0
    """The most begin-of-text tokens at the start of any row: more than one is refused."""
    rows_with_special_text: list[str] = field(default_factory=list)
    """Rows whose own text contains control tokens of the tokenizer, which the model will read as such."""
    rows_without_thoughts: list[str] = field(default_factory=list)
    """Rows with an answer whose thoughts the chat template does not write."""
    rows_without_tools: list[str] = field(default_factory=list)
    """Rows with tools that the chat template does not write."""
    rows_with_moved_system: list[str] = field(default_factory=list)
    """Rows whose system message the chat template has no place for; `data.turn_order` says what became of it."""
    rows_with_unread_variables: list[str] = field(default_factory=list)
    """Rows that set variables that the chat template does not read."""
    prompt_tokens: Lengths = field(default_factory=Lengths)
    """Tokens of system, user and tool messages, row by row."""
    answer_tokens: Lengths = field(default_factory=Lengths)
    template_hash: str = ""
    problems: list[str] = field(default_factory=list)
    """Rows of the files that cannot be used and are left out: `file:line: reason`."""
    notes: list[str] = field(default_factory=list)
    """What was noticed of rows that are kept, and of what the loss does not use."""
    compared: bool = False
    """Whether a loss compares answers, which leaves no choice of a mask."""
    prompts: bool = False
    """Whether the rows only ask, and the model answers while it is trained: counts are then of prompts."""
    from_cache: bool = False
    """Whether the tokens were rendered by an earlier run, from the same rows by the same means."""
    shared_share: float | None = None
    """Share of the tokens that shared beginnings save, over the first steps; None where sharing is off."""
    pack_fill: float | None = None
    """Tokens of the packs of the first steps, as a share of what they may hold; None where rows are not packed."""
    survey: Survey | None = None
    """What the rows themselves look like; None where nobody looked."""

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / max(1, self.tokens)

    @property
    def prompt_ratio(self) -> float:
        """Tokens of prompts for each token of answers."""
        return self.prompt_tokens.total / max(1, self.answer_tokens.total)

    @property
    def suggested_mask(self) -> str:
        """`instruction` where the published gain is (see LONG_PROMPTS), else what is set."""
        if self.compared or self.rows < LEAST_ROWS:
            return self.mask
        worth_trying = self.prompt_ratio >= LONG_PROMPTS or (self.rows <= FEW_ROWS and self.prompt_ratio >= 1)
        return "instruction" if self.mask == "response" and worth_trying else self.mask

    def to_json(self) -> dict[str, Any]:
        tree = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("prompt_tokens", "answer_tokens", "survey"):
            tree[name] = tree[name] and tree[name].to_json()
        derived = ("supervised_share", "prompt_ratio", "suggested_mask")
        return tree | {name: getattr(self, name) for name in derived}

    def lines(self) -> list[tuple[str, str]]:
        """The report as (name, value) pairs for a table; what was found in the rows is `survey.lines()`."""
        over = []
        if self.dropped_over_length:
            over.append(f"{len(self.dropped_over_length):,} dropped")
        if self.truncated_over_length:
            lost = f"{self.truncated_without_end:,} lost their ending"
            over.append(f"{len(self.truncated_over_length):,} truncated, {lost}")
        end = repr(self.end_of_turn) if self.end_of_turn else "nothing: the template does not end an answer"
        pairs = [("format", self.format), ("rows", f"{self.rows:,}")]
        pairs.append(("tokens", f"{self.tokens:,}"))
        if self.shared_share is not None:
            pairs.append(("shared beginnings", f"save {self.shared_share:.1%} of the tokens of a step"))
        if self.pack_fill is not None:
            pairs.append(("packs", f"{self.pack_fill:.0%} full"))
        pairs += [
            ("supervised", f"{self.supervised_tokens:,} ({self.supervised_share:.1%}), mask {self.mask!r}"),
            ("longest row", f"{self.longest_tokens:,} tokens ({self.longest_row})"),
            (f"over {self.max_tokens:,} tokens", "; ".join(over) or "none"),
            ("tokens of a prompt", str(self.prompt_tokens)),
            ("tokens of an answer", str(self.answer_tokens)),
            ("prompts to answers", f"{self.prompt_ratio:.2g} tokens to one{self._advice()}"),
            ("an answer ends with", f"{end}, {'trained' if self.end_of_turn_trained else 'NOT trained'}"),
        ]
        if self.prompts:
            pairs = [pair for pair in pairs if pair[0] not in OF_ANSWERS]
        if self.unterminated:
            pairs.append(("EOS not in loss", shown_places(self.unterminated)))
        pairs += [
            ("begin-of-text tokens", f"at most {self.most_bos} a row"),
            ("chat template", self.template_hash),
        ]
        if self.rows_with_special_text:
            pairs.append(("special tokens in text", shown_places(self.rows_with_special_text)))
        if self.from_cache:
            pairs.append(("rendered", "by an earlier run, from the same rows"))
        if self.problems:
            said = numbered(self.problems, 5)
            pairs.append(("left out", f"{len(self.problems):,} rows that can NOT be used:\n{said}"))
        if self.notes:
            pairs.append(("noted", f"{len(self.notes):,}:\n{numbered(self.notes, 5)}"))
        return pairs

    def _advice(self) -> str:
        better = f": mask {self.suggested_mask!r} may do better (docs/how-to/masks.md)"
        return better if self.suggested_mask != self.mask else ""


@lasting()
def prepare(
    rows: Sequence[Row],
    renderer: Renderer,
    data: DataConfig,
    *,
    format: str = "",
    progress: Callable[[int], None] | None = None,
    workers: int | None = None,
    cache: Path | None = None,
) -> tuple[list[Example], Report]:
    """Examples ready to pack, and the report, whose `problems` are the rows that cannot be trained on and are left out.

    Raises DataError that lists them where none is left, and where `data` asks for it: `strict`, or over_length `error`.
    Many rows are rendered on `workers` cores (None: all), and kept in the folder `cache` where one is given: the same
    rows, template, tokenizer, mask and code find them there again.
    """
    report = _report(renderer, data, format)
    examples: list[Example] = []
    problems: list[str] = []
    parts: list[str] = []
    done = 0
    for some, columns in _chunks(rows, renderer, data, report, workers, cache):
        examples.extend(_examples(some, columns, renderer, data, report, problems, parts))
        for number in range(done, done + len(some)):
            if progress:
                progress(number + 1)
        done += len(some)
    wrong = [*problems, *parts]
    if wrong and (data.strict or data.over_length == "error" or not examples):
        raise DataError(f"{len(wrong)} of {len(rows)} rows cannot be trained on:\n" + numbered(wrong))
    report.problems += problems
    report.notes[:0] = unread_keys(rows)
    report.notes += parts + unheard(len(report.rows_without_thoughts), len(report.rows_without_tools))
    if moved := len(report.rows_with_moved_system):
        where = "is put before the first question" if data.turn_order == "merge" else "is left out"
        report.notes.append(
            f"{moved:,} rows have a system message, and the chat template has no place for it: it {where} "
            f"(data.turn_order: {data.turn_order})"
        )
    if unread := len(report.rows_with_unread_variables):
        report.notes.append(f"{unread:,} rows set template variables that the chat template does not read")
    if not examples:
        raise DataError(
            f"no row is left to train on: all {len(rows)} are longer than max_tokens={data.max_tokens}. "
            "Raise data.max_tokens, or set data.over_length: truncate"
        )
    return examples, report


def stream(
    rows: Iterable[Row],
    renderer: Renderer,
    data: DataConfig,
    *,
    workers: int | None = None,
    done: Callable[[int], None] = lambda rows: None,
) -> Iterator[Example]:
    """Examples one after the other, from rows that need not fit into memory: a few chunks are held at a time. `done` is
    told now and then of how many rows all examples have been given.

    Raises DataError at the first chunk with rows that cannot be trained on, and names them.
    """
    report = _report(renderer, data, "")
    count = 0
    for some, columns in rendered(rows, renderer, data, workers):
        problems: list[str] = []
        yield from _examples(some, columns, renderer, data, report, problems, problems)
        if problems:
            raise DataError("rows cannot be trained on:\n" + numbered(problems))
        count += len(some)
        done(count)


def _report(renderer: Renderer, data: DataConfig, format: str) -> Report:
    return Report(format=format, mask=data.mask, max_tokens=data.max_tokens, template_hash=renderer.template_hash)


def _chunks(
    rows: Sequence[Row],
    renderer: Renderer,
    data: DataConfig,
    report: Report,
    workers: int | None,
    cache: Path | None,
) -> Iterator[tuple[Sequence[Row], Columns]]:
    """The rows with their columns: from the cache, or rendered and then kept there where they are many."""
    if cache is None or not (isinstance(rows, KeptRows) or many(rows)):
        yield from rendered(rows, renderer, data, workers)
        return
    file = cache / f"{token_cache.key(rows, renderer, data)}.safetensors"
    try:
        found = token_cache.load(file)
    except token_cache.DamagedError as error:
        found = None
        report.notes.append(f"rendered anew: {file} was damaged ({error})")
    if found is not None:
        report.from_cache = True
        yield rows, found
        return
    parts = []
    for some, columns in rendered(rows, renderer, data, workers):
        parts.append(columns)
        yield some, columns
    token_cache.save(file, join(parts))


def _examples(
    rows: Sequence[Row],
    columns: Columns,
    renderer: Renderer,
    data: DataConfig,
    report: Report,
    problems: list[str],
    parts: list[str],
) -> Iterator[Example]:
    """The pieces within max_tokens that teach something; the others go to the report, to the problems or, where other
    pieces of their rows stay, to `parts`."""
    starts, lengths = columns.starts, columns.ends - columns.starts
    kept_lengths = np.minimum(lengths, data.max_tokens)
    facts = _facts(columns, kept_lengths, renderer.tokenizer.bos_token_id)
    wrong = dict(columns.problems)
    taught: set[int] = set()
    keeps = np.ones(len(lengths), np.bool_)
    odd = (lengths > data.max_tokens) | (facts.supervised == 0) | (facts.bos > 1)
    ends = (starts + kept_lengths).tolist()
    pieces = zip(columns.rows.tolist(), starts.tolist(), ends, odd.tolist(), strict=True)
    stands = places(rows)
    for piece, (number, start, end, is_odd) in enumerate(pieces):
        where = stands[number]
        if is_odd:
            why = _why_not(piece, where, int(lengths[piece]), data, facts, report)
            if why is not None:
                keeps[piece] = False
                if why:
                    wrong.setdefault(number, why)
                continue
        if not report.end_of_turn and facts.ends[piece]:
            _ending(report, columns, slice(start, int(columns.ends[piece])), renderer)
        taught.add(number)
        yield Example(columns.ids[start:end], columns.weights[start:end], where)
    report.rows_in_part += [stands[n] for n in dict.fromkeys(columns.rows[~keeps].tolist()) if n in taught]
    for number, why in sorted(wrong.items()):
        if number in taught:
            parts.append(
                f"{stands[number]}: some of its answers, each of which is a row of its own, are left out: {why}"
            )
        else:
            problems.append(f"{stands[number]}: {why}")
    _count(report, stands, columns, kept_lengths, keeps, facts)


def _why_not(piece: int, where: str, length: int, data: DataConfig, facts: "_Facts", report: Report) -> str | None:
    """What is wrong with a piece; empty where it is dropped as the config says, None where it is kept."""
    too_long = length > data.max_tokens
    if too_long and data.over_length == "error":
        return (
            f"{length} tokens are more than max_tokens={data.max_tokens}. Raise it, or set data.over_length to drop or "
            "truncate"
        )
    if too_long and data.over_length == "drop":
        report.dropped_over_length.append(where)
        return ""
    if too_long:
        report.truncated_over_length.append(where)
        report.truncated_without_end += bool(facts.ends_beyond[piece])
    if not facts.supervised[piece]:
        why = f"the first {data.max_tokens} tokens hold no answer" if too_long else f"mask {data.mask!r}"
        return f"no token of this row is supervised ({why}): it would teach nothing"
    if facts.bos[piece] > 1:
        return "the row begins with two begin-of-text tokens: the chat template or the row writes one too many"
    return None


@dataclass(frozen=True)
class _Facts:
    """Of every piece, as arrays [P]; of the tokens that are kept where nothing else is said."""

    supervised: NDArray[np.int64]
    prompt: NDArray[np.int64]
    answer: NDArray[np.int64]
    unterminated: NDArray[np.int64]
    ends: NDArray[np.int64]
    """Tokens that end a turn, in the whole piece."""
    ends_beyond: NDArray[np.int64]
    bos: NDArray[np.int64]


def _facts(columns: Columns, lengths: NDArray[np.int64], bos: int | None) -> _Facts:
    """The facts of all pieces, of some at a time: what is compared on the way then stays in the cache."""
    lots = np.flatnonzero(np.diff(columns.starts // AT_ONCE, prepend=-1)).tolist()
    found = [
        _facts_of(columns, slice(first, last), lengths[first:last], bos)
        for first, last in pairwise([*lots, len(lengths)])
    ] or [_facts_of(columns, slice(0, 0), lengths, bos)]
    return _Facts(*(np.concatenate([getattr(part, f.name) for part in found]) for f in fields(_Facts)))


def _facts_of(columns: Columns, pieces: slice, lengths: NDArray[np.int64], bos: int | None) -> _Facts:
    starts, ends = columns.starts[pieces], columns.ends[pieces]
    begin, end = (int(starts[0]), int(ends[-1])) if len(starts) else (0, 0)
    starts, ends = starts - begin, ends - begin
    ids, roles, trained = columns.ids[begin:end], columns.roles[begin:end], columns.weights[begin:end] != 0
    answer, ending = roles == Role.ASSISTANT, roles == Role.END_OF_TURN
    # A trained answer is over where the next token is none of it; that one should be a trained end of turn. What
    # follows the last kept token belongs to another piece or is cut off: nothing follows it.
    goes_on = answer | (ending & trained)
    followed = np.zeros(len(roles), np.bool_)
    followed[:-1] = goes_on[1:]
    followed[starts + lengths - 1] = False

    def count(values: NDArray[np.bool_], lengths: NDArray[np.int64] = lengths) -> NDArray[np.int64]:
        return _sums(values, starts, lengths)

    whole = ends - starts
    kept_ends = count(ending)
    all_ends = kept_ends if np.array_equal(whole, lengths) else count(ending, whole)
    begins = np.zeros(len(starts), np.int64)
    if bos is not None and len(starts):
        second = (ids[np.minimum(starts + 1, ends - 1)] == bos) & (whole > 1)
        begins = (ids[starts] == bos) * (1 + second)
    return _Facts(
        supervised=count(trained),
        prompt=count(_PROMPT[roles]),
        answer=count(answer),
        unterminated=count(answer & trained & ~followed),
        ends=all_ends,
        ends_beyond=all_ends - kept_ends,
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


def _count(
    report: Report,
    stands: Sequence[str],
    columns: Columns,
    lengths: NDArray[np.int64],
    keeps: NDArray[np.bool_],
    facts: _Facts,
) -> None:
    if not keeps.any():
        return
    report.rows += int(keeps.sum())
    report.tokens += int(lengths[keeps].sum())
    report.supervised_tokens += int(facts.supervised[keeps].sum())
    longest = int(np.argmax(np.where(keeps, lengths, 0)))
    if lengths[longest] > report.longest_tokens:
        report.longest_tokens, report.longest_row = int(lengths[longest]), stands[columns.rows[longest]]
    report.most_bos = max(report.most_bos, int(facts.bos[keeps].max()))
    report.prompt_tokens.add(facts.prompt[keeps])
    report.answer_tokens.add(facts.answer[keeps])
    report.rows_with_special_text += _places(stands, columns.rows[keeps & columns.control[columns.rows]])
    lost = columns.lost[columns.rows]
    report.rows_without_thoughts += _places(stands, columns.rows[keeps & (lost & LOST_THOUGHTS > 0)])
    report.rows_without_tools += _places(stands, columns.rows[keeps & (lost & LOST_TOOLS > 0)])
    report.rows_with_moved_system += _places(stands, columns.rows[keeps & (lost & MOVED_SYSTEM > 0)])
    report.rows_with_unread_variables += _places(stands, columns.rows[keeps & (lost & UNREAD_VARIABLES > 0)])
    report.unterminated += _places(stands, columns.rows[keeps & (facts.unterminated > 0)])


def _places(stands: Sequence[str], numbers: NDArray[np.int64]) -> list[str]:
    """Where these rows stand, each once."""
    return [stands[number] for number in dict.fromkeys(numbers.tolist())]


def _ending(report: Report, columns: Columns, piece: slice, renderer: Renderer) -> None:
    """What the first answer of this piece ends with, and whether all such ends of the piece are trained."""
    ending = columns.roles[piece] == Role.END_OF_TURN
    first = int(np.argmax(ending))
    run = ending[first:]
    length = int(np.argmin(run)) if not run.all() else len(run)
    report.end_of_turn = "".join(renderer.token_texts(columns.ids[piece][first : first + length].tolist()))
    report.end_of_turn_trained = bool((columns.weights[piece][ending] != 0).all())


def unheard(thoughts: int, tools: int) -> list[str]:
    """The notes on so many rows whose thoughts, or tools, the chat template does not write."""
    notes = []
    if tools:
        notes.append(f"{tools:,} rows list tools that the chat template does not write: the model will not see them")
    if thoughts:
        notes.append(f"{thoughts:,} rows have thoughts that the chat template does not write: they are not trained")
    return notes


def shown_rows(rows: Sequence[Row], renderer: Renderer, data: DataConfig, count: int) -> list[dict[str, Any]]:
    """The first rows token by token: {where, raw, tokens: [{id, text, role, weight}]}, one for each piece of a row."""
    shown = []
    for row in rows[:count]:
        for piece in renderer.rows(row.messages, row.tools, row.variables):
            parts = zip(
                piece.ids,
                renderer.token_texts(piece.ids.tolist()),
                piece.roles,
                weights(piece, data.mask, data.prompt_weight),
                strict=True,
            )
            tokens = [{"id": int(i), "text": t, "role": Role(r).label, "weight": float(w)} for i, t, r, w in parts]
            shown.append({"where": row.where, "raw": row.messages[0].role == TEXT, "tokens": tokens})
    return shown
