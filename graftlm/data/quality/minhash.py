"""Texts that are nearly the same, and phrases that texts share.

A text is the set of its word 5-grams, and two texts are as alike as their sets (Broder 1997, "On the resemblance and
containment of documents"):

    J(A, B) = |A n B| / |A u B|

In a random order of all 5-grams, A and B have the same least element with the chance J. K random orders h -> a h + b
(mod 2^32, a odd) so give each text K numbers, and the share of numbers that agree estimates J (MinHash). To find pairs
without looking at all of them, the numbers are cut into B bands of R, and only texts that agree in a whole band are
looked at: a pair is found with the chance 1 - (1 - J^R)^B, here 0.99995 at J = 0.8 and 0.55 at J = 0.5. What is found
so is compared exactly. Everything is drawn from a fixed seed: the same texts give the same answer.

Words are those of `words_of`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from unicodedata import category, normalize

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]
"""The words of a text, in order, each as a number."""

Grams = NDArray[np.uint64]
"""The different n-grams of a text as hashes, in ascending order."""

NEAR_WORDS = 5
BANDS, BAND_ROWS = 25, 5
LEAST = 0.8
"""From so much likeness on, two texts are near-duplicates."""

SHARED_WORDS = 13
"""A phrase of so many words in common is no accident (Brown et al. 2020, arXiv:2005.14165, appendix C)."""

COMMON = 10
"""Phrases of more training rows than this are boilerplate and count for nothing (the same appendix)."""

MOST_WORDS = 1_000
"""Only the beginning of a longer text is read: this bounds the time."""

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


@cache
def _word() -> re.Pattern[str]:
    """A word of any script. `re` takes the marks that Indic and Arabic scripts write above and below letters for
    separators, so they are listed."""
    marks, symbols = (_class(0x300, kinds) for kinds in (("Mn", "Mc", "Me"), ("So",)))
    return re.compile(rf"(?:[^\W_{_UNSPACED}]+[{marks}]*)+|[{_UNSPACED}{symbols}][{marks}]*")


def _class(first: int, kinds: Sequence[str]) -> str:
    """The characters of these Unicode categories from `first` on, as ranges of a regular expression's class."""
    codes = [code for code in range(first, 0x20000) if category(chr(code)) in kinds]
    starts = [code for code, before in zip(codes, [0, *codes], strict=False) if code != before + 1]
    ends = [code for code, after in zip(codes, [*codes[1:], 0], strict=True) if code + 1 != after]
    return "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True))


_ASCII_WORD = re.compile("[a-z0-9]+")


def words_of(text: str) -> list[str]:
    """The words of a text in any script, in lower case and in one Unicode form (NFKC).

    A word is a run of letters, digits and marks. Of scripts without spaces between words it is a character with its
    marks; an emoji is a word too. `_`, punctuation and white space are none.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _word().findall(normalize("NFKC", text).casefold())


class WordNumbers:
    """Texts as arrays of word numbers; the same word has the same number in all of them."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}

    def of(self, text: str) -> Numbers:
        # A word is a character at least, and mostly no more than sixteen.
        found = words_of(text[: 16 * MOST_WORDS])[:MOST_WORDS]
        return np.array([self._number.setdefault(word, len(self._number)) for word in found], np.uint64)


def grams(words: Numbers, count: int) -> Grams:
    """The n-grams of `count` words; a shorter text is one of its own."""
    count = max(1, min(count, len(words)))
    total = np.full(max(0, len(words) - count + 1), count, np.uint64)
    for place in range(count):
        total = _mixed(total ^ words[place : place + len(total)])
    return np.unique(total)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit numbers that looks random (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def resemblance(a: Grams, b: Grams) -> float:
    """J, exactly."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)


def near_duplicates(texts: Sequence[Grams], least: float = LEAST) -> list[tuple[int, int, float]]:
    """Pairs (earlier, later, J) that are at least so much alike, each text with the first that it was found to be like.

    Not every such pair: the pairs connect all texts that are alike, directly or through others.
    """
    leaders = list(range(len(texts)))  # of a text: an earlier one of its group, up to the first

    def first(text: int) -> int:
        while leaders[text] != text:
            leaders[text] = leaders[leaders[text]]
            text = leaders[text]
        return text

    found = []
    for a, b in _candidates(_signatures(texts), least - 0.15):
        if first(a) != first(b):
            alike = resemblance(texts[a], texts[b])
            if alike >= least:
                leaders[max(first(a), first(b))] = min(first(a), first(b))
                found.append((a, b, alike))
    return found


def _signatures(texts: Sequence[Grams]) -> NDArray[np.uint32]:
    """The K least elements of each text: uint32 [texts, K]."""
    draw = np.random.default_rng(0)
    factors = draw.integers(0, 2**31, BANDS * BAND_ROWS, np.uint32) * np.uint32(2) + np.uint32(1)
    offsets = draw.integers(0, 2**32, BANDS * BAND_ROWS, np.uint32)
    found = np.empty((len(texts), BANDS * BAND_ROWS), np.uint32)
    for number, text in enumerate(texts):
        if len(text):
            found[number] = (text.astype(np.uint32)[:, None] * factors + offsets).min(axis=0)
        else:  # no words: like no other text
            found[number] = draw.integers(0, 2**32, BANDS * BAND_ROWS, np.uint32)
    return found


def _candidates(signatures: NDArray[np.uint32], least: float) -> list[tuple[int, int]]:
    """Pairs that agree in a band and whose estimated J is at least so much, in ascending order.

    Of the texts that agree in a band each is paired with the first and with the one before it, so that the number of
    pairs grows as the number of texts does.
    """
    pairs = []
    for band in np.split(signatures, BANDS, axis=1):
        keys = np.zeros(len(band), np.uint64)
        for column in band.T:
            keys = _mixed(keys ^ column)
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1  # agree with the one before them
        begins = np.ones(len(order), np.bool_)
        begins[same] = False
        leader = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
        pairs += [np.stack([order[same - 1], order[same]], 1), np.stack([order[leader[same]], order[same]], 1)]
    every = np.unique(np.concatenate(pairs), axis=0) if pairs else np.empty((0, 2), np.int64)
    agree = [
        (signatures[part[:, 0]] == signatures[part[:, 1]]).mean(axis=1)
        for part in np.array_split(every, 1 + len(every) // 50_000)
    ]
    return [(int(a), int(b)) for a, b in every[np.concatenate(agree) >= least]]


@dataclass(frozen=True)
class SharedPhrases:
    """A training text and a held-out text with phrases in common."""

    trained: int
    held_out: int
    share: float
    """The share of the held-out text's phrases."""


def shared_phrases(trained: Iterable[Grams], held_out: Sequence[Grams]) -> list[SharedPhrases]:
    """Which training texts contain phrases of held-out texts, as n-grams; what more than COMMON of them contain is
    left out. A pair for each training text, with the held-out text that it shares most with."""
    owners = np.repeat(np.arange(len(held_out)), [len(text) for text in held_out])
    phrases, place = np.unique(np.concatenate([np.empty(0, np.uint64), *held_out]), return_index=True)
    owner = owners[place]
    if not len(phrases):
        return []
    times = np.zeros(len(phrases), np.int64)
    hits: list[tuple[int, NDArray[np.int64]]] = []
    for number, text in enumerate(trained):
        at = np.searchsorted(phrases, text[text <= phrases[-1]])
        at = at[phrases[at] == text[: len(at)]]
        if len(at):
            times[at] += 1
            hits.append((number, at))
    found = []
    for number, at in hits:
        rare = at[times[at] <= COMMON]
        if len(rare):
            most = np.bincount(owner[rare])
            twin = int(np.argmax(most))
            found.append(SharedPhrases(number, twin, float(most[twin] / len(held_out[twin]))))
    return found
