"""Rows -> packs: rows lie end to end with positions that restart, and the loss is a list of triples.

A pack is a list of segments. Without sharing every segment is a row. With it, rows that begin alike have that beginning
in common, as a tree: a segment continues the row of its parent, sees all segments on the way to its root, and its
positions go on from there. What was one computation for each row becomes one for all, and nothing else changes.

Nor is a row computed to its end: what stands after the token that predicts its last target changes no loss.

A loss triple is (hidden row, target, weight): the hidden state at `hidden_rows[i]` predicts `targets[i]`. Rows never
predict across their boundary. A token that several rows train after the same beginning is one triple with the sum of
their weights; a hidden state after which rows part has a target for each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A row ready to train on: ids int32 [n], weights float32 [n] (the weight of token i as a target), its place."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    where: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def needed(self) -> NDArray[np.int32]:
        """The tokens that a forward pass must see: up to the one that predicts the last target."""
        trained = self.weights.nonzero()[0]
        return self.ids[: max(1, trained[-1])] if len(trained) else self.ids[:1]


@dataclass(frozen=True)
class Pack:
    """One forward pass: ids and positions [1, T], its segments, and S loss triples."""

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    """Tokens of each segment; they sum to T."""
    parents: list[int]
    """The segment that each one continues; -1 where it begins a row. A parent stands before its children."""
    hidden_rows: Tensor
    targets: Tensor
    weights: Tensor
    where: list[tuple[str, ...]]
    """The rows that each segment is a part of."""
    row_tokens: int
    """Tokens of all rows, of which T are computed."""

    @property
    def rows(self) -> list[str]:
        """The places of all rows of the pack, each once."""
        return list(dict.fromkeys(row for rows in self.where for row in rows))

    @property
    def segment_of(self) -> Tensor:
        """The segment in which the hidden state of each triple lies, int64 [S]."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return torch.bucketize(self.hidden_rows.cpu(), ends, right=True)

    def rows_of(self, marked: Tensor) -> list[str]:
        """The rows in which the triples lie that are marked, bool [S]; all rows where none is."""
        segments = sorted(set(self.segment_of[marked.cpu()].tolist()))
        return list(dict.fromkeys(row for i in segments for row in self.where[i])) or self.rows

    def to(self, device: torch.device) -> "Pack":
        moved = {k: getattr(self, k).to(device) for k in ("ids", "positions", "hidden_rows", "targets", "weights")}
        rest = {k: getattr(self, k) for k in ("lengths", "parents", "where", "row_tokens")}
        return Pack(**moved, **rest)


# The tree of beginnings ------------------------------------------------------------------------------------------

LEAST_SHARED = 8
"""A segment is cut in two where rows part only if so many tokens before the cut are shared: a cut costs time too."""


@dataclass(eq=False)
class _Segment:
    parent: "_Segment | None"
    start: int
    ids: NDArray[np.int32]
    children: list["_Segment"] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Those that end here."""


class _Tree:
    """Rows that go into one pack, by their common beginnings."""

    def __init__(self) -> None:
        self.root = _Segment(None, 0, np.empty(0, np.int32))
        self.examples: list[Example] = []
        self.tokens = self.longest = 0

    def common(self, ids: NDArray[np.int32]) -> tuple[_Segment, _Segment | None, int]:
        """How far a row is here already: (last whole segment, the one after it that agrees in part, tokens of that)."""
        here, depth = self.root, 0
        while True:
            best, agree = None, 0
            for child in here.children:
                if (n := _agree(child.ids, ids[depth:])) > agree:
                    best, agree = child, n
            if best is not None and agree == len(best.ids):
                here, depth = best, depth + agree
            elif agree >= LEAST_SHARED:
                return here, best, agree
            else:
                return here, None, 0

    def shared(self, ids: NDArray[np.int32]) -> int:
        here, _, agree = self.common(ids)
        return here.start + len(here.ids) + agree

    def add(self, example: Example, *, share: bool) -> None:
        ids = example.needed
        here, part, agree = self.common(ids) if share else (self.root, None, 0)
        if part is not None:
            upper = _Segment(here, part.start, part.ids[:agree], [part])
            here.children[here.children.index(part)] = upper
            part.parent, part.start, part.ids = upper, part.start + agree, part.ids[agree:]
            here = upper
        depth = here.start + len(here.ids)
        if depth < len(ids):
            here.children.append(_Segment(here, depth, ids[depth:]))
            here = here.children[-1]
        here.rows.append(len(self.examples))
        self.examples.append(example)
        self.tokens += len(ids) - depth
        self.longest = max(self.longest, len(ids))

    def segments(self) -> list[_Segment]:
        """Every segment, each after its parent."""
        found, waiting = [], list(reversed(self.root.children))
        while waiting:
            found.append(waiting.pop())
            waiting.extend(reversed(found[-1].children))
        return found

    def pack(self) -> Pack:
        segments = self.segments()
        number = {id(segment): i for i, segment in enumerate(segments)}
        lengths = [len(segment.ids) for segment in segments]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        hidden, targets, weights = [], [], []
        where: list[list[str]] = [[] for _ in segments]
        for last in segments:
            path = _path(last)
            places = np.concatenate([starts[number[id(s)]] + np.arange(len(s.ids)) for s in path])
            for row in last.rows:
                example = self.examples[row]
                trained = example.weights.nonzero()[0]
                assert not len(trained) or trained[0] > 0, "nothing predicts the first token of a row"
                hidden.append(places[trained - 1])
                targets.append(example.ids[trained])
                weights.append(example.weights[trained])
                for segment in path:
                    where[number[id(segment)]].append(example.where)
        triples = np.stack([np.concatenate(hidden), np.concatenate(targets).astype(np.int64)])
        triples, place = np.unique(triples, axis=1, return_inverse=True)
        summed = np.bincount(place.reshape(-1), np.concatenate(weights), triples.shape[1])
        return Pack(
            ids=torch.from_numpy(np.concatenate([s.ids for s in segments]).astype(np.int64))[None],
            positions=torch.cat([torch.arange(s.start, s.start + len(s.ids)) for s in segments])[None],
            lengths=lengths,
            parents=[number.get(id(s.parent), -1) for s in segments],
            hidden_rows=torch.from_numpy(triples[0].copy()),
            targets=torch.from_numpy(triples[1].copy()),
            weights=torch.from_numpy(summed.astype(np.float32)),
            where=[tuple(names) for names in where],
            row_tokens=sum(map(len, self.examples)),
        )


def _agree(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens two rows begin with alike."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n


def _path(segment: _Segment) -> list[_Segment]:
    """The segments of a row that ends with this one, from its beginning."""
    found = [segment]
    while (parent := found[-1].parent) is not None and parent.parent is not None:
        found.append(parent)
    return found[::-1]


# Packs -----------------------------------------------------------------------------------------------------------


def collate(examples: Sequence[Example], *, share: bool = False) -> Pack:
    """One pack of all these rows, end to end or, with `share`, as the tree of their beginnings."""
    tree = _Tree()
    for example in examples:
        tree.add(example, share=share)
    return tree.pack()


def pack(examples: Sequence[Example], tokens: int, *, share: bool = False) -> list[Pack]:
    """Split a batch into packs of at most `tokens`; a longer row has a pack of its own.

    Splitting changes memory, never the result: the loss is a sum over triples. With `share`, rows that begin alike go
    into the same pack and their beginning is computed once; behind a beginning that is longer than what follows, a
    pack may hold `tokens` more than its longest row, because another pack would compute that beginning again.
    """
    return [tree.pack() for tree in _trees(examples, tokens, share)]


def lay_out(examples: Sequence[Example], tokens: int, *, packed: bool, share: bool = False) -> list[Pack]:
    """The passes over these rows: in packs, or one row at a time."""
    return pack(examples, tokens, share=share) if packed else [collate([example]) for example in examples]


def _trees(examples: Sequence[Example], tokens: int, share: bool) -> list[_Tree]:
    """What `pack` lays out, the largest first."""
    if share:  # neighbours in this order have the longest beginnings in common
        ordered = sorted(examples, key=lambda e: e.ids.tolist())
    else:
        ordered = sorted(examples, key=lambda e: len(e.needed), reverse=True)
    trees: list[_Tree] = []
    for example in ordered:
        ids, best = example.needed, None
        for tree in trees:
            common = tree.shared(ids) if share else 0
            new = len(ids) - common
            room = tokens + (tree.longest if common > new else 0) - tree.tokens
            if new <= room and (best is None or common > best[0]):
                best = common, tree
        if best is None:
            best = 0, _Tree()
            trees.append(best[1])
        best[1].add(example, share=share)
    return sorted(trees, key=lambda tree: -tree.tokens)  # where memory is short it shows at once


def saved_by_sharing(steps: Sequence[Sequence[Example]], tokens: int) -> float:
    """The share of the tokens of these steps that shared beginnings save."""
    apart, shared = (
        sum(tree.tokens for rows in steps for tree in _trees(rows, tokens, share)) for share in (False, True)
    )
    return 1 - shared / apart


def fill(steps: Sequence[Sequence[Example]], tokens: int, *, share: bool) -> float:
    """How full the packs of these steps are: computed tokens over those that the packs may hold."""
    trees = [tree for rows in steps for tree in _trees(rows, tokens, share)]
    return sum(tree.tokens for tree in trees) / (len(trees) * tokens)


def batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """The rows of each step: `steps` lists of `size` indices, epoch after epoch, each epoch in an order of its own."""
    assert count > 0
    generator = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < steps * size:
        order.extend(generator.permutation(count).tolist())
    return [order[i * size : (i + 1) * size] for i in range(steps)]
