"""The pre-flight report: what training will see, counted before it starts."""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.data.quality.survey import Survey, format_places
from graftlm.errors import numbered

LONG_PROMPTS = 4.0
FEW_ROWS = 2_000
LEAST_ROWS = 100
"""Shi et al. 2024 (arXiv:2405.14394) found that loss over instructions helps where instructions are long against the
answers and where rows are few. They give no threshold; these are ours. Of a handful of rows the lengths say nothing."""


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
        rank = share * self.counts.sum()
        return int(np.searchsorted(np.cumsum(self.counts), rank)) if rank else 0

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
            note = f"{self.truncated_without_end:,} lost their ending"
            over.append(f"{len(self.truncated_over_length):,} truncated, {note}")
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
            pairs.append(("EOS not in loss", format_places(self.unterminated)))
        pairs += [
            ("begin-of-text tokens", f"at most {self.most_bos} a row"),
            ("chat template", self.template_hash),
        ]
        if self.rows_with_special_text:
            pairs.append(("special tokens in text", format_places(self.rows_with_special_text)))
        if self.from_cache:
            pairs.append(("rendered", "by an earlier run, from the same rows"))
        if self.problems:
            problem_lines = numbered(self.problems, 5)
            pairs.append(("left out", f"{len(self.problems):,} rows that can NOT be used:\n{problem_lines}"))
        if self.notes:
            pairs.append(("noted", f"{len(self.notes):,}:\n{numbered(self.notes, 5)}"))
        return pairs

    def _advice(self) -> str:
        better = f": mask {self.suggested_mask!r} may do better (docs/how-to/masks.md)"
        return better if self.suggested_mask != self.mask else ""


def unwritten_notes(thoughts: int, tools: int) -> list[str]:
    """The notes on so many rows whose thoughts, or tools, the chat template does not write."""
    notes = []
    if tools:
        notes.append(f"{tools:,} rows list tools that the chat template does not write: the model will not see them")
    if thoughts:
        notes.append(f"{thoughts:,} rows have thoughts that the chat template does not write: they are not trained")
    return notes
