"""Keys and values of requests that ended, for those that begin with the same tokens and have the same deltas."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftlm.generation.attention import Cache
from graftlm.generation.requests import RowKey

SLACK = 1.25
"""A cache that is larger than its tokens by this factor is copied into one that fits."""

State = dict[str, tuple[int, int, int]]


@dataclass(eq=False)
class _Kept:
    key: RowKey
    tokens: list[int]
    cache: Cache


class PrefixStore:
    """Caches of at most `limit` tokens in all; those that were used last stay.

    A cache belongs to the very deltas that it was computed with: their names, weights and when each was attached
    (`RowKey`). No request with another key gets it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        """Tokens for which memory is held."""
        self._kept: list[_Kept] = []
        """What was used last stands last."""
        self._state: State = {}

    def keep(self, key: RowKey, tokens: Sequence[int], cache: Cache, room: int | None) -> None:
        """Keep a cache that holds `tokens`, if it fits into `room` tokens and no other one holds them and more."""
        limit = self.limit if room is None else min(self.limit, room)
        alike = [(one, common(one.tokens, tokens)) for one in self._kept if one.key == key]
        if more := next((one for one, same in alike if same == len(tokens)), None):
            self._use(more)
            return
        if cache.capacity > SLACK * (len(tokens) + cache.always):
            whole, cache = cache, Cache(len(tokens), cache.before)
            cache.copy_from(whole, len(tokens))
        if cache.capacity > limit:
            return
        for one, same in alike:
            if same == len(one.tokens):
                self._drop(one)
        self.shrink(limit - cache.capacity)
        self._kept.append(_Kept(key, list(tokens), cache))
        self.held += cache.capacity

    def longest(self, key: RowKey, tokens: Sequence[int]) -> tuple[Cache | None, int]:
        """The cache that has the most first tokens in common, and how many."""
        alike = [(common(one.tokens, tokens), one) for one in self._kept if one.key == key]
        same, found = max(alike, key=lambda each: each[0], default=(0, None))
        if found is None or not same:
            return None, 0
        self._use(found)
        return found.cache, same

    def shrink(self, limit: int) -> None:
        """Hold no more than so many tokens."""
        while self._kept and self.held > limit:
            self._drop(self._kept[0])

    def drop_unless(self, valid: Callable[[RowKey], bool]) -> None:
        for one in list(self._kept):
            if not valid(one.key):
                self._drop(one)

    def drop_if_changed(self, model: Any) -> bool:
        """Drop all if a weight is another one than at the last call, or was changed in place. Returns whether that may
        be; a store that holds nothing does not look."""
        if not self.limit:
            return True
        now = _state([*model.named_parameters(), *model.named_buffers()])
        changed = any(now.get(name, was) != was for name, was in self._state.items())
        if changed:
            self.shrink(0)
        self._state = now
        return changed

    def _use(self, one: _Kept) -> None:
        self._kept.remove(one)
        self._kept.append(one)

    def _drop(self, one: _Kept) -> None:
        self._kept.remove(one)
        self.held -= one.cache.capacity


def _state(tensors: Iterable[tuple[str, Tensor]]) -> State:
    return {name: (id(tensor), tensor.data_ptr(), tensor._version) for name, tensor in tensors}


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are the same."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
