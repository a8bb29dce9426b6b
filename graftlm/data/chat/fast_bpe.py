"""Plain text to ids word by word, four times as fast as the tokenizer itself, and the very same ids.

A byte-level BPE cuts a text at added tokens and at words, by a regular expression, and then knows nothing of what is
around a word. So the ids of a word need to be asked for once. What must be right is where words end. That is vouched
for only where nothing is in doubt: for ASCII text (of which Python's classes of characters are those of any Unicode
version), for the few expressions below, and for tokenizers that do nothing else to a text. All others, and all other
text, go to the tokenizer as ever. One text in CHECKED goes both ways, and a difference stops everything.
"""

import json
import re
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.models import BPE

_LAST = r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel cuts by (Radford et al. 2019, encoder.py)."""

KNOWN = (
    GPT2,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?" + _LAST,  # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?" + _LAST,  # Qwen 2 to 3
)
CHECKED = 64
SHORT = 32
"""Characters of a text that is kept whole, as what templates write between control tokens is."""

MOST = 100_000
"""Words and short texts of each of two lots that are kept, some 40 MB in all. When one is full it is the older, and the
one before is dropped, so that what is met again and again stays."""


class BpeWords:
    """The ids and offsets of a text, for one tokenizer (`of` says whether it is one that can be done so)."""

    def __init__(self, encoder: Any, pattern: str) -> None:
        self._encoder = encoder
        self._find = re.compile(ascii_only(pattern), re.ASCII).findall
        vocabulary: dict[str, int] = encoder.get_vocab(with_added_tokens=True)
        self._lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
        self._lengths[list(vocabulary.values())] = list(map(len, vocabulary))  # each of its characters is a byte
        ids = {token.content: number for number, token in encoder.get_added_tokens_decoder().items()}
        longest_first = sorted(ids, key=len, reverse=True)
        # Without added tokens a pattern that matches nowhere: an empty one would cut everywhere.
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._added = {text: np.int32(number).tobytes() for text, number in ids.items()}
        self._known, self._older = dict[str, bytes](), dict[str, bytes]()
        """Bytes of ids, for bytes are joined quicker than lists, and are an array as they are."""
        self._count = 0

    @classmethod
    def of(cls, encoder: Any) -> "BpeWords | None":
        """None where the tokenizer does anything but what is vouched for above."""
        model, pattern = encoder.model, _pattern(_state(encoder.pre_tokenizer))
        plain = (
            isinstance(model, BPE)
            and not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix)
            and _state(encoder.normalizer).get("type", "NFC") == "NFC"  # which ASCII text is in already
            and not any(
                token.lstrip or token.rstrip or token.single_word or token.normalized
                for token in encoder.get_added_tokens_decoder().values()
            )
        )
        return cls(encoder, pattern) if plain and pattern is not None else None

    def encode(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]] | None:
        """ids, and where the characters of each begin and end: each [n]; None where `ids` knows none, and where they
        do not cover the text."""
        found = self.ids(text)
        if found is None:
            return None
        ids = np.frombuffer(bytearray(found), np.int32)  # bytes could not be written to
        lengths = self._lengths[ids]
        ends = lengths.cumsum()
        return (ids, ends - lengths, ends) if len(text) == (ends[-1] if len(ends) else 0) else None

    def ids(self, text: str) -> bytes | None:
        """The ids, int32 [n]; None for text that is not ASCII, and where a word is none."""
        if not text.isascii():
            return None
        found: list[bytes] = []
        for number, part in enumerate(self._cut.split(text)):
            if number % 2:
                found.append(self._added[part])
            elif part:
                part_ids = self._known.get(part) or self._of_words(part)
                if part_ids is None:
                    return None
                found.append(part_ids)
        ids = b"".join(found)
        if self._count % CHECKED == 0:
            assert ids == self._by_tokenizer(text), f"other ids for {text!r}"
        self._count += 1
        return ids

    def _of_words(self, part: str) -> bytes | None:
        """The ids of text without added tokens."""
        words = self._find(part)
        found = list(map(self._known.get, words, repeat(b"")))  # which no word's ids are
        if not all(found):
            if len(self._known) > MOST:
                self._older, self._known = self._known, {}
            for place in [place for place, ids in enumerate(found) if not ids]:
                word = words[place]
                ids = self._known.get(word) or self._older.get(word, b"")
                if not ids:
                    if len(self._encoder.pre_tokenizer.pre_tokenize_str(word)) != 1:
                        return None
                    ids = self._by_tokenizer(word)
                found[place] = self._known[word] = ids
        joined = b"".join(found)
        if len(part) <= SHORT:
            self._known[part] = joined
        return joined

    def _by_tokenizer(self, text: str) -> bytes:
        return np.array(self._encoder.encode(text, add_special_tokens=False).ids, np.int32).tobytes()


def ascii_only(pattern: str) -> str:
    """The expression for ASCII text, in Python's words."""
    inside = re.sub(r"\[([^\]]*)\]", lambda found: f"[{_ranges(found[1])}]", pattern)
    return re.sub(r"\\p\{([LN])\}", lambda found: f"[{_ranges(found[0])}]", inside)


def _ranges(text: str) -> str:
    return text.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9")


def _state(part: Any) -> dict[str, Any]:
    """The state of a part as tokenizer.json has it; empty where the tokenizer has no such part."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state


def _pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """The expression that cuts words, where it is one of the known ones and nothing else is done."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not before:
        return GPT2 if last["use_regex"] else None
    if len(before) > 1 or last["use_regex"] or before[0]["type"] != "Split":
        return None
    (splitter,) = before
    pattern = splitter["pattern"].get("Regex")
    plain = splitter["behavior"] == "Isolated" and not splitter["invert"]
    return pattern if plain and pattern in KNOWN else None
