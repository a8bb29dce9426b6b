"""The text of an answer while its tokens come.

    stream = TextStream(tokenizer, stop=["\\n\\n"])
    for token in tokens:
        if piece := stream.add(token): ...   # text that is sure to stay
    if piece := stream.close(): ...

All pieces together are what the tokenizer decodes all ids to, before the first stop text. A token costs the same
wherever in the answer it stands.
"""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

CONTEXT = 8
"""Tokens before the new ones that are decoded with them. What begins a text may lose a space, and a text that begins
within a character has other characters for the rest of it; what follows, after at most three bytes, is the same."""

BROKEN = "\ufffd"
"""What decoding writes for bytes that are no whole character. At the end of a text it may yet become another one."""


class TextPiece(NamedTuple):
    """A piece of text, and its tokens: those of the answer, by their number, whose last character it brings. The last
    piece before a stop text has the token in which that begins, and may have no text."""

    text: str
    tokens: range


class _Kind(NamedTuple):
    """What of a tokenizer matters here."""

    skipped: frozenset[int]
    """Special tokens, where they are no part of the text."""
    bytes: frozenset[int]
    """Tokens that are one byte each. Those in a row are decoded together: if they are not UTF-8 as a whole, each is a
    broken character, so nothing of them is sure before another token follows."""


@lru_cache(maxsize=8)
def _kind(tokenizer: Any, keep_special: bool) -> _Kind:
    special = (int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special and not keep_special)
    backend = tokenizer.backend_tokenizer
    by_bytes = backend.decoder is not None and b"ByteFallback" in backend.decoder.__getstate__()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256 if by_bytes else 0))
    return _Kind(frozenset(special), frozenset(i for i in ids if i is not None))


class TextStream:
    """Tokens of one answer in, text out. `stop`: the answer ends before the first of these texts, the one that is
    complete first. `keep_special`: special tokens are a part of the text, as tags of calls and of thoughts may be.

    Raises ValueError for an empty text in `stop`. Needs a tokenizer with a fast backend.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, keep_special: bool = False) -> None:
        if "" in stop:
            raise ValueError("stop: an empty text is in every answer, before its first character")
        self.stopped_by: str | None = None
        """The stop text that ended the answer. It takes no more tokens then."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._kind = _kind(tokenizer, keep_special)
        self._window: list[int] = []
        """The last ids with a text."""
        self._done = 0
        """Characters of the window's text that are in `_length`."""
        self._length = 0
        """Characters of the answer that are sure."""
        self._held = ""
        """Those of them that were not given yet."""
        self._given = 0
        """Tokens that were given."""
        self._bounds: deque[tuple[int, int]] = deque()
        """(first character, the one after the last) of the tokens that were not given."""

    def add(self, token: int) -> TextPiece | None:
        """The text that is sure with this token; None where there is none yet."""
        if self.stopped_by is not None:
            return None
        before = self._length
        self._take(self._decoded(token))
        self._bounds.append((before, self._length))
        return self._piece(is_last=False)

    def close(self) -> TextPiece | None:
        """The rest of the text and of the tokens, when there are no more; None where there is none."""
        if self.stopped_by is not None:
            return None
        self._take(self._text(self._window)[self._done :])
        self._window, self._done = [], 0
        return self._piece(is_last=True)

    def _take(self, text: str) -> None:
        self._length += len(text)
        self._held += text

    def _decoded(self, token: int) -> str:
        """The text that is sure with one more token."""
        unknown = self._tokenizer.backend_tokenizer.id_to_token(token) is None  # of a padded vocabulary
        if token in self._kind.skipped or unknown:
            return ""
        self._window.append(token)
        if token in self._kind.bytes:
            return ""
        text = self._text(self._window)
        sure = max(self._done, len(text) - text.endswith(BROKEN))
        found, self._done = text[self._done : sure], sure
        if len(self._window) >= 2 * CONTEXT:
            self._window = self._window[-CONTEXT:]
            self._done += len(self._text(self._window)) - len(text)  # counted from the end, which is the same
        return found

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _piece(self, is_last: bool) -> TextPiece | None:
        start = self._length - len(self._held)
        found = [(at + len(text), at, text) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            _, count, self.stopped_by = min(found)
        else:
            count = len(self._held) - (0 if is_last else may_become(self._held, self._stop))
        text, self._held = self._held[:count], self._held[count:]
        if not text and not is_last and not found:
            return None
        tokens = self._tokens_until(start + count, is_last)
        return TextPiece(text, tokens) if text or tokens else None

    def _tokens_until(self, end: int, is_last: bool) -> range:
        """The tokens that are given with the text before a character."""
        first = self._given
        while self._bounds:
            begins, ends = self._bounds[0]
            if begins >= end if self.stopped_by is not None else ends > end and not is_last:
                break
            self._bounds.popleft()
            self._given += 1
        return range(first, self._given)


def may_become(text: str, stop: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a text that ends the answer."""
    lengths = (n for each in stop for n in range(1, len(each)) if text.endswith(each[:n]))
    return max(lengths, default=0)
