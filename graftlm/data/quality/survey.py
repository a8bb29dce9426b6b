"""What the rows themselves look like: duplicates, rows that are also held out, languages, and rows worth a second look.

No tokenizer is needed. The time is bounded: near-duplicates and shared phrases are looked for among at most NEAR_ROWS
rows and in the first words of each, languages are guessed from GUESSED_ROWS rows; the survey says what it looked at.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from graftlm.data.quality import minhash
from graftlm.data.quality.languages import language
from graftlm.data.sources.formats import TEXT, Message
from graftlm.data.sources.load import SAME
from graftlm.data.sources.source import Row

NEAR_ROWS = 100_000
"""About a minute on one core at the most; half of it for rows of a few hundred words."""

GUESSED_ROWS = 5_000
SHOWN = 3
"""Places that a line of the terminal names; all of them are in the JSON."""

REPEATED_ANSWER_WORDS = 5
REPEATED_ANSWER_TIMES = 5
"""An answer of a few words may well be right many times (yes; no; a label); a sentence rarely is."""

_NOT = r"(?:can't|cannot|am not able|am unable|won't)"
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|large language model|language model)\b"
    r"|\bi'm (?:just |only )?an? (?:ai|language model)\b"
    rf"|\bi'm (?:very |so |really )?sorry,? (?:but )?i {_NOT}\b"
    rf"|\bi {_NOT} (?:to )?(?:assist|help|fulfil|fulfill|comply|provide|engage|create|generate)\b"
    r"|\bmy (?:knowledge cut-?off|training data)\b|\bopenai(?:'s)? (?:policy|policies|content policy)\b",
    re.IGNORECASE,
)
REFUSAL_CHARACTERS = 300
"""An answer that refuses does so at its beginning."""

WHY = {
    "exact duplicates": "trained on more than once in an epoch",
    "near-duplicates": f"share at least {minhash.LEAST:.0%} of their word 5-grams with another row",
    "train/held-out overlap": "held-out figures say nothing about rows that were trained on",
    "refusals": "the model learns to refuse",
    "repeated answers": "the same sentence answers different questions",
    "empty thinking": "the model learns not to think",
    "encoding damage": "characters that were read in the wrong encoding",
}

_EMPTY_THINKING = re.compile(r"<(think|thinking|reasoning|thought)>\s*</\1>", re.IGNORECASE)

# UTF-8 that was read as Latin-1 or Windows-1252: a lead byte's letter, and then what bytes 0x80 to 0xBF are read as.
_BYTE = (
    "[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014\u2018-\u201a\u201c-\u201e"
    "\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]"
)
_DAMAGE = re.compile(
    rf"\ufffd|[\u00c2\u00c3]{_BYTE}|\u00e2[\u0080\u20ac]{_BYTE}|\u00f0[\u009f\u0178]{_BYTE}|\u00ef\u00bb\u00bf"
    rf"|(?:[\u00c4\u00c5\u00ce\u00cf\u00d0\u00d1\u00d8\u00d9]{_BYTE}){{2}}"
)


@dataclass(frozen=True)
class Entry:
    """Rows that belong together, often one, and what was seen."""

    rows: list[str]
    note: str = ""


@dataclass
class Finding:
    kind: str
    why: str
    """Why one should look."""
    entries: list[Entry] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Rows that one might take out: of rows that are alike all but one."""
        return sum(max(1, len(entry.rows) - 1) for entry in self.entries)


@dataclass
class Survey:
    rows: int = 0
    looked_for_near: int = 0
    """Rows among which near-duplicates and phrases shared with held-out rows were looked for."""
    languages: dict[str, int] = field(default_factory=dict)
    """A guess, for up to GUESSED_ROWS rows: how many are of which language."""
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        findings = [{**asdict(finding), "count": finding.count} for finding in self.findings]
        return {**asdict(self), "findings": findings}

    def lines(self) -> list[tuple[str, str]]:
        """What was found, as (name, value) pairs; a few rows of each kind."""
        guessed = sum(self.languages.values())
        top = [f"{name} {count / guessed:.0%}" for name, count in list(self.languages.items())[:5]]
        pairs = [("languages (a guess)", ", ".join(top) or "none")]
        if self.looked_for_near < self.rows:
            pairs.append(("near-duplicates", f"looked for among {self.looked_for_near:,} of {self.rows:,} rows"))
        for finding in self.findings:
            if finding.entries:
                examples = "; ".join(_format_entry(entry) for entry in finding.entries[:SHOWN])
                more = " ..." if len(finding.entries) > SHOWN else ""
                pairs.append((finding.kind, f"{finding.count:,}: {examples}{more}"))
        if not any(finding.entries for finding in self.findings):
            pairs.append(("findings", "no issues found"))
        return pairs


def format_places(places: Sequence[str]) -> str:
    """How many rows, and the first of them."""
    return f"{len(places):,} rows: {', '.join(places[:SHOWN])}{' ...' if len(places) > SHOWN else ''}"


def _format_entry(entry: Entry) -> str:
    rows = " = ".join(entry.rows[:SHOWN]) + (f" = {len(entry.rows) - SHOWN} more" if len(entry.rows) > SHOWN else "")
    return f"{rows} ({entry.note})" if entry.note else rows


def survey(rows: Sequence[Row], held_out: Sequence[Row] = ()) -> Survey:
    """Look at training rows, and at the held-out rows that they should have nothing to do with."""
    rows = list({row.where: row for row in rows}.values())  # one that a mixture draws several times is no duplicate
    guesses = Counter(language(_text(row)) for row in _some(rows, GUESSED_ROWS))
    same, firsts = _same(rows)
    some = _some(rows, NEAR_ROWS)
    words = minhash.WordNumbers()
    texts = [words.of(_text(row)) for row in some]
    different = [number for number, row in enumerate(some) if id(row) in firsts]
    found = {
        "exact duplicates": same,
        "near-duplicates": _near([some[i] for i in different], [texts[i] for i in different]),
        "train/held-out overlap": _leaks(rows, held_out, some, texts, words) if held_out else [],
        "refusals": _each(rows, _refusal),
        "repeated answers": _repeated(rows),
        "empty thinking": _each(rows, _empty_thinking),
        "encoding damage": _each(rows, _damage),
    }
    findings = [Finding(kind, WHY[kind], entries) for kind, entries in found.items()]
    return Survey(len(rows), len(some), dict(guesses.most_common()), findings)


def notes_beyond_survey(notes: Sequence[str], survey: Survey) -> list[str]:
    """The notes of reading, without those on duplicate rows, which the survey reports too."""
    same = next(finding for finding in survey.findings if finding.kind == "exact duplicates")
    duplicates = {row for entry in same.entries for row in entry.rows[1:]}
    return [note for note in notes if note.partition(f": {SAME} ")[0] not in duplicates]


def evenly(count: int, most: int) -> list[int]:
    """At most so many of the numbers from 0 to count - 1, at even distances."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def _some(rows: Sequence[Row], most: int) -> list[Row]:
    return [rows[i] for i in evenly(len(rows), most)]


def _text(row: Row) -> str:
    """What the row is about: a system message often stands in all of them."""
    return "\n".join(message.all_text for message in row.messages if message.role != "system")


def _digest(messages: Sequence[Message]) -> bytes:
    parts = [(m.role, m.content.strip(), m.tool_calls, m.thinking) for m in messages]
    return hashlib.blake2b(json.dumps(parts, default=dict).encode(), digest_size=16).digest()


def _question(row: Row) -> list[Message]:
    """All that stands before the last answer; nothing in raw text."""
    last = max((i for i, m in enumerate(row.messages) if m.role == "assistant"), default=0)
    return row.messages[:last]


# Kinds of findings -----------------------------------------------------------------------------------------------


def _same(rows: Sequence[Row]) -> tuple[list[Entry], set[int]]:
    """Rows that are the same, white space at the ends of messages apart; and the ids of the first of each kind."""
    groups: dict[bytes, list[Row]] = {}
    for row in rows:
        groups.setdefault(_digest(row.messages), []).append(row)
    entries = [Entry([row.where for row in group]) for group in groups.values() if len(group) > 1]
    return entries, {id(group[0]) for group in groups.values()}


def _near(rows: Sequence[Row], texts: Sequence[minhash.Numbers]) -> list[Entry]:
    pairs = minhash.near_duplicates([minhash.grams(text, minhash.NEAR_WORDS) for text in texts])
    pairs.sort(key=lambda pair: -pair[2])
    return [Entry([rows[a].where, rows[b].where], f"{alike:.0%} alike") for a, b, alike in pairs]


def _leaks(
    rows: Sequence[Row],
    held_out: Sequence[Row],
    some: Sequence[Row],
    texts: Sequence[minhash.Numbers],
    words: minhash.WordNumbers,
) -> list[Entry]:
    """Training rows that are held out too: wholly, by their question, or by long phrases; each with one such row."""
    whole = {_digest(row.messages): row for row in reversed(held_out)}
    by_question = {_digest(question): row for row in reversed(held_out) if (question := _question(row))}
    found: dict[int, tuple[float, Entry]] = {}
    for row in rows:
        question = _question(row)
        if twin := whole.get(_digest(row.messages)):
            found[id(row)] = 2, Entry([row.where, twin.where], "the same row")
        elif question and (twin := by_question.get(_digest(question))):
            found[id(row)] = 1, Entry([row.where, twin.where], "the same question")
    phrases = minhash.shared_phrases(
        (minhash.grams(text, minhash.SHARED_WORDS) for text in texts),
        [minhash.grams(words.of(_text(row)), minhash.SHARED_WORDS) for row in held_out],
    )
    for phrase in phrases:
        row, twin = some[phrase.trained], held_out[phrase.held_out]
        note = f"{phrase.share:.0%} of its phrases of {minhash.SHARED_WORDS} words"
        found.setdefault(id(row), (phrase.share, Entry([row.where, twin.where], note)))
    return [entry for _, entry in sorted(found.values(), key=lambda each: -each[0])]


def _repeated(rows: Sequence[Row]) -> list[Entry]:
    """Answers of a sentence or more that are given to many different questions, the most frequent first."""
    rows_by_answer: dict[bytes, dict[bytes, Row]] = {}
    for row in rows:
        for message in row.messages:
            if message.role == "assistant" and len(minhash.words_of(message.content[:200])) >= REPEATED_ANSWER_WORDS:
                answer = hashlib.blake2b(" ".join(message.content.lower().split()).encode(), digest_size=16).digest()
                rows_by_answer.setdefault(answer, {}).setdefault(_digest(_question(row)), row)
    often = sorted(
        (list(g.values()) for g in rows_by_answer.values() if len(g) >= REPEATED_ANSWER_TIMES), key=lambda g: -len(g)
    )
    return [Entry([row.where for row in group], _excerpt(_last_answer(group[0]))) for group in often]


def _last_answer(row: Row) -> str:
    return next((m.content for m in reversed(row.messages) if m.role == "assistant"), "")


def _each(rows: Sequence[Row], look: Callable[[Message], str]) -> list[Entry]:
    """Rows with a message in which `look` sees something, and what."""
    found = []
    for row in rows:
        notes = (look(message) for message in row.messages)
        if note := next(filter(None, notes), ""):
            found.append(Entry([row.where], note))
    return found


def _refusal(message: Message) -> str:
    if message.role != "assistant":
        return ""
    begin = message.content[:REFUSAL_CHARACTERS].replace("\u2019", "'")
    found = _REFUSAL.search(begin)
    return _excerpt(begin[found.start() :]) if found else ""


def _empty_thinking(message: Message) -> str:
    if message.role not in ("assistant", TEXT):
        return ""
    found = _EMPTY_THINKING.search(message.content)
    return repr(found[0]) if found else "blank" if message.thinking and not message.thinking.strip() else ""


def _damage(message: Message) -> str:
    if message.content.isascii():
        return ""
    found = _DAMAGE.search(message.content)
    return _excerpt(message.content[max(0, found.start() - 10) :]) if found else ""


def _excerpt(text: str) -> str:
    return repr(" ".join(text[:80].split())[:40])
