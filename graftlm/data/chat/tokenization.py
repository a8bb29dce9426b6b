"""Text -> tokens with their places in it, such that a prompt has the ids in a row that it has alone."""

import copy
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers.processors import ByteLevel

from graftlm.data.chat.fast_bpe import BpeWords
from graftlm.errors import BaseModelError, DataError

ANCHORS = ("\n", "a", ".")
BROKEN = "\ufffd"
"""The character that decoding writes for bytes that are no whole character."""
MOST_PIECES = 16
"""Tokens that are looked at together to find whole characters: a character has four bytes at most."""


class Tokens(NamedTuple):
    """The n tokens of a text, in order: neither starts nor ends go back."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    """The character that each begins with."""
    ends: NDArray[np.int64]
    controls: list[int]
    """The places of control tokens."""


class Tokenization:
    """A tokenizer for rendered texts: ids with character offsets, and which tokens are control tokens.

    Raises BaseModelError where the tokenizer has no fast backend, and so no character offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise BaseModelError(
                f"{type(tokenizer).__name__} has no character offsets, and masks need them: the base must come with a "
                "tokenizer.json (convert it once with transformers' convert_slow_tokenizer)",
                code="no-character-offsets",
            )
        self.tokenizer = tokenizer
        self.end_ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self.end_texts = [] if tokenizer.eos_token is None else [str(tokenizer.eos_token)]
        added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_texts = tuple(token.content for token in added.values() if token.special)
        # What can end a turn: some tokenizers have their end of turn as an added token that is not called special, and
        # some have runs of white space as added tokens, which end nothing.
        self.control = sorted(i for i, token in added.items() if token.special or token.content.strip())
        self.control_texts = tuple(added[i].content for i in self.control)
        count = max(added, default=-1) + 2  # the last one stands for all that are higher
        self.is_control = np.zeros(count, np.bool_)
        self.is_control[self.control] = True
        self._encoder = copy.deepcopy(backend)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        # Post-processors may trim spaces from offsets and add special tokens; the template alone says what is fed.
        self._encoder.post_processor = ByteLevel(trim_offsets=False)
        self._words = BpeWords.of(self._encoder)

    def for_rows(self) -> "Tokenization":
        """A copy without the tokenizer itself, which is quick to send to another process."""
        own = copy.copy(self)
        own.__dict__.update(tokenizer=None, begin_ids=self.begin_ids)
        return own

    def encode(self, text: str, cuts: Sequence[int]) -> Tokens:
        """The text's tokens. At each cut generation would have begun: what is before it has the very ids that it has
        as a prompt, whatever follows.

        Mostly that is so by itself, and the text is tokenised as one. It is not where a token would lie across the
        cut, or where what follows changes the tokens before (a regular expression that looks ahead).
        """
        whole = self._piece(text, 0, len(text))
        if all(self._is_prompt(text, cut, whole) for cut in cuts):
            return whole
        found: list[Tokens] = []
        start = 0
        bounds = [*sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
        head = self._piece(text, 0, bounds[0])
        for cut, until in pairwise(bounds):
            whole = self._piece(text, start, until)
            same = np.array_equal(whole.ids[: len(head.ids)], head.ids)
            across = ((whole.starts < cut) & (whole.ends > cut)).any()
            if same and not across:
                head = whole
            else:
                found.append(head)
                start, head = cut, self._piece(text, cut, until)
        found.append(head)
        ids = np.concatenate([part.ids for part in found])
        starts, ends = (np.concatenate([getattr(part, name) for part in found]) for name in ("starts", "ends"))
        return self._tokens(ids, starts, ends)

    def _is_prompt(self, text: str, cut: int, tokens: Tokens) -> bool:
        """Whether the tokens of the text before the cut are the very tokens that text[:cut] has by itself.

        What stands before a control token is tokenised apart from what follows it, so only the tokens from the last
        one on can be others.
        """
        before = int(tokens.ends.searchsorted(cut, "right"))
        if before < len(tokens.ids) and tokens.starts[before] < cut:
            return False  # a token lies across
        earlier = bisect_left(tokens.controls, before)
        first = tokens.controls[earlier - 1] if earlier else 0
        tail = text[tokens.starts[first] if first else 0 : cut]
        found = self._words.ids(tail) if self._words is not None else None
        if found is None:
            return bool(self._encoder.encode(tail, add_special_tokens=False).ids == tokens.ids[first:before].tolist())
        return found == tokens.ids[first:before].tobytes()

    def _piece(self, text: str, start: int, end: int) -> Tokens:
        """The tokens of text[start:end]; what does not begin the text is tokenised as what does not."""
        if start == 0:
            return self._tokens(*self._plain(text[:end]))
        for anchor in ANCHORS:  # some tokenizers put a space before whatever begins a text: let it begin with this
            ids, starts, ends = self._plain(anchor + text[start:end])
            shift = start - len(anchor)
            if not ((starts < len(anchor)) & (ends > len(anchor))).any():
                own = ends > len(anchor)
                return self._tokens(ids[own], starts[own] + shift, ends[own] + shift)
        ids, starts, ends = self._plain(text[start:end])
        return self._tokens(ids, starts + start, ends + start)

    def _tokens(self, ids: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Tokens:
        return Tokens(ids, starts, ends, self.is_control.take(ids, mode="clip").nonzero()[0].tolist())

    def _plain(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        if self._words is not None and (found := self._words.encode(text)) is not None:
            return found
        encoding = self._encoder.encode(text, add_special_tokens=False)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64)
        starts, ends = offsets[::2], offsets[1::2]
        if (starts[1:] < starts[:-1]).any() or (ends[1:] < ends[:-1]).any():
            raise DataError(
                "the tokenizer gives places of tokens that go back, so it cannot be said what they are of",
                code="token-offsets-decrease",
            )
        return np.array(encoding.ids, np.int32), starts, ends

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and without tidying up."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, special tokens included. Of a character that several tokens make, the first has all of
        it and the others have none."""
        texts: list[str] = []
        while (start := len(texts)) < len(ids):
            text = self._text(ids[start : start + 1])
            if BROKEN not in text:
                texts.append(text)
                continue
            if list(ids[start : start + len(self._broken_ids)]) == self._broken_ids:  # the text itself has it
                texts += [BROKEN, *[""] * (len(self._broken_ids) - 1)]
                continue
            # tokens may hold the end of one character and the beginning of the next: all that hang together
            ends = range(start + 2, min(len(ids), start + MOST_PIECES) + 1)
            whole = ((end, self._text(ids[start:end])) for end in ends)
            end, text = next(((end, found) for end, found in whole if BROKEN not in found), (start + 1, text))
            texts += [text, *[""] * (end - start - 1)]
        return texts

    @cached_property
    def _broken_ids(self) -> list[int]:
        return list(self._encoder.encode(BROKEN, add_special_tokens=False).ids)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False))

    @cached_property
    def begin_ids(self) -> list[int]:
        """The begin-of-text token, where the tokenizer itself puts it before a text that no template has rendered."""
        bos = self.tokenizer.bos_token_id
        return [int(bos)] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []
