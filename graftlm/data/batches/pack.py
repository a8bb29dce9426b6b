"""Rows -> packs: rows lie end to end with positions that restart, and the loss is a list of triples.

A pack is a list of segments. Without sharing every segment is a row. With it, rows that begin alike have that beginning
in common, as a tree: a segment continues the row of its parent, sees all segments on the way to its root, and its
positions go on from there. What was one computation for each row becomes one for all, and nothing else changes.

Nor is a row computed to its end: what stands after the token that predicts its last target changes no loss.

A loss triple is (hidden row, target, weight): the hidden state at `hidden_rows[i]` predicts `targets[i]`. Rows never
predict across their boundary. A token that several rows train after the same beginning is one triple with the sum of
their weights; a hidden state after which rows part has a target for each of them.

A group is several answers to one prompt that a loss compares: they lie in one pack, where they share the prompt, and a
token that two of them have in common stays two triples, one of each answer. An answer of several turns is several rows
where the chat template rewrites earlier turns: their triples are all of that one answer, so its log-probability is the
sum over its turns, each after what generation would have read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
    old_log_probs: NDArray[np.float32] | None = None
    """float32 [n]: of answers that a policy sampled, its log-probability of each token then; only in groups."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answers(self) -> tuple["Example", ...]:
        """Itself: nobody compares it."""
        return (self,)

    @property
    def needed(self) -> NDArray[np.int32]:
        """The tokens that a forward pass must see: up to the one that predicts the last target."""
        places = self.weights.nonzero()[0]
        return self.ids[: max(1, places[-1])] if len(places) else self.ids[:1]

    def cost(self, *, share: bool = True) -> int:
        """Tokens that are computed for it alone."""
        return len(self.needed)


@dataclass(frozen=True)
class Group:
    """Answers to one prompt, whole rows each, that must lie in one pack because a loss compares them."""

    answers: tuple[Example, ...]
    """Rows: one for each answer, or several where `numbers` says so."""
    scores: tuple[float, ...]
    """What is known of each answer: liked 1 or not 0, a share of wins, a reward."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Which of them are compared: (chosen, rejected)."""
    numbers: tuple[int, ...] = ()
    """The number, from 0, of the answer that each row is a part of, in order; empty where each row is an answer."""
    mismatched: bool = False
    """Whether it is only looked at, for a number that the whole step needs, and teaches nothing."""

    def __len__(self) -> int:
        return sum(map(len, self.answers))

    @property
    def where(self) -> str:
        return self.answers[0].where

    def parts(self) -> list[tuple[Example, ...]]:
        """The rows of each answer."""
        numbers = self.numbers or range(len(self.answers))
        rows = list(zip(numbers, self.answers, strict=True))
        return [tuple(row for own, row in rows if own == number) for number in range(len(self.scores))]

    @property
    def liked(self) -> list[Example]:
        """Rows of answers that one would imitate."""
        return [row for rows, score in zip(self.parts(), self.scores, strict=True) for row in rows if score > 0.5]

    def cost(self, *, share: bool = True) -> int:
        """Tokens that are computed for it alone; with `share`, its prompt once."""
        return _lone([self], share).tokens


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
    answers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[S]: the answer that each triple is a token of; empty where there are no groups."""
    pairs: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    """[P, 2]: answers that are compared, (chosen, rejected)."""
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    """[N]: what is known of each answer."""
    prompt_ends: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[N]: the hidden row where the prompt of each answer ends, which predicts the answer's first trained token."""
    old_log_probs: Tensor | None = None
    """float32 [S]: log-probabilities from when the answers were sampled."""
    mismatched: bool = False

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
        tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def idle(self) -> "Pack":
        """The same forward pass, from which nothing is learnt."""
        fields = ("hidden_rows", "targets", "weights", "answers", "pairs", "scores", "prompt_ends")
        nothing: dict[str, Any] = {name: getattr(self, name)[:0] for name in fields}
        old_log_probs = None if self.old_log_probs is None else self.old_log_probs[:0]
        return replace(self, **nothing, old_log_probs=old_log_probs, row_tokens=0)


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
    """The rows that end here."""


class _Tree:
    """Rows that go into one pack, by their common beginnings."""

    def __init__(self) -> None:
        self.root = _Segment(None, 0, np.empty(0, np.int32))
        self.examples: list[Example] = []
        self.numbers: list[int] = []
        """For rows in groups: the answer of the pack that each row is a part of."""
        self.scores: list[float] = []
        self.pairs: list[tuple[int, int]] = []
        self.mismatched = False
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

    def add(self, item: Example | Group, *, share: bool) -> None:
        if isinstance(item, Group):
            assert len(self.numbers) == len(self.examples), "rows and groups of answers do not mix"
            assert self.mismatched == item.mismatched or not self.examples, "mismatched groups have their own packs"
            self.pairs += [(len(self.scores) + a, len(self.scores) + b) for a, b in item.pairs]
            self.numbers += [len(self.scores) + n for n in item.numbers or range(len(item.answers))]
            self.scores += item.scores
            self.mismatched = item.mismatched
        for example in item.answers:
            self._add(example, share)
        assert len(self.numbers) in (0, len(self.examples)), "rows and groups of answers do not mix"
        assert sorted({*self.numbers}) == [*range(len(self.scores))], "one score for each answer"

    def _add(self, example: Example, share: bool) -> None:
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
        found, stack = [], list(reversed(self.root.children))
        while stack:
            found.append(stack.pop())
            stack.extend(reversed(found[-1].children))
        return found

    def pack(self) -> Pack:
        segments = self.segments()
        place_of = {id(segment): i for i, segment in enumerate(segments)}
        lengths = [len(segment.ids) for segment in segments]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        hidden, targets, weights, answers, sampled = [], [], [], [], []
        prompt_ends: dict[int, tuple[int, int]] = {}  # of each answer: (its first row, the hidden row)
        where: list[list[str]] = [[] for _ in segments]
        for last in segments:
            path = _path(last)
            places = np.concatenate([starts[place_of[id(s)]] + np.arange(len(s.ids)) for s in path])
            for row in last.rows:
                example = self.examples[row]
                trained_places = example.weights.nonzero()[0]
                assert not len(trained_places) or trained_places[0] > 0, "nothing predicts the first token of a row"
                hidden.append(places[trained_places - 1])
                targets.append(example.ids[trained_places])
                weights.append(example.weights[trained_places])
                if self.scores:
                    number = self.numbers[row]
                    answers.append(np.full(len(trained_places), number))
                    end = (row, int(places[trained_places[0] - 1])) if len(trained_places) else (row, 0)
                    prompt_ends[number] = min(end, prompt_ends.get(number, end))
                if example.old_log_probs is not None:
                    sampled.append(example.old_log_probs[trained_places])
                for segment in path:
                    where[place_of[id(segment)]].append(example.where)
        triples = np.stack([np.concatenate(hidden), np.concatenate(targets).astype(np.int64)])
        if self.scores:  # the same token of two answers stays two triples
            triples = np.concatenate([triples, np.concatenate(answers)[None]])
        triples, place = np.unique(triples, axis=1, return_inverse=True)
        old_log_probs = None
        if sampled:
            assert self.scores, "only answers in groups are told apart"
            assert len(sampled) == len(self.examples), "all answers of a pack were sampled, or none"
            old_log_probs = torch.empty(triples.shape[1])
            old_log_probs[torch.from_numpy(place.reshape(-1))] = torch.from_numpy(np.concatenate(sampled))
        summed = np.bincount(place.reshape(-1), np.concatenate(weights), triples.shape[1])
        return Pack(
            ids=torch.from_numpy(np.concatenate([s.ids for s in segments]).astype(np.int64))[None],
            positions=torch.cat([torch.arange(s.start, s.start + len(s.ids)) for s in segments])[None],
            lengths=lengths,
            parents=[place_of.get(id(s.parent), -1) for s in segments],
            hidden_rows=torch.from_numpy(triples[0].copy()),
            targets=torch.from_numpy(triples[1].copy()),
            weights=torch.from_numpy(summed.astype(np.float32)),
            where=[tuple(names) for names in where],
            row_tokens=sum(map(len, self.examples)),
            answers=torch.from_numpy(triples[2].copy() if self.scores else np.empty(0, np.int64)),
            pairs=torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2),
            scores=torch.tensor(self.scores, dtype=torch.float32),
            prompt_ends=torch.tensor([prompt_ends[n][1] for n in range(len(self.scores))], dtype=torch.int64),
            old_log_probs=old_log_probs,
            mismatched=self.mismatched,
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


def collate(items: Sequence[Example | Group], *, share: bool = False) -> Pack:
    """One pack of all these rows, end to end or, with `share`, as the tree of their beginnings."""
    return _lone(items, share).pack()


def pack(items: Sequence[Example | Group], tokens: int, *, share: bool = False) -> list[Pack]:
    """Split a batch into packs of at most `tokens`; a longer row, or group, has a pack of its own.

    Splitting changes memory, never the result: the loss is a sum over triples. With `share`, rows that begin alike go
    into the same pack and their beginning is computed once; behind a beginning that is longer than what follows, a
    pack may hold `tokens` more than its longest row, because another pack would compute that beginning again.
    """
    return [tree.pack() for tree in _trees(items, tokens, share)]


def lay_out(items: Sequence[Example | Group], tokens: int, *, packed: bool, share: bool = False) -> list[Pack]:
    """The passes over these rows: in packs, or one row at a time."""
    return pack(items, tokens, share=share) if packed else [collate([item]) for item in items]


def _lone(items: Sequence[Example | Group], share: bool) -> _Tree:
    tree = _Tree()
    for item in items:
        tree.add(item, share=share)
    return tree


def _trees(items: Sequence[Example | Group], tokens: int, share: bool) -> list[_Tree]:
    """What `pack` lays out, the largest first."""
    if share:  # neighbours in this order have the longest beginnings in common
        queue = sorted(items, key=lambda item: item.answers[0].ids.tolist())
    else:
        queue = sorted(items, key=lambda item: item.cost(share=share), reverse=True)
    trees: list[_Tree] = []
    for item in queue:
        alone, best = item.cost(share=share), None
        for tree in trees:
            common = max(tree.shared(answer.needed) for answer in item.answers) if share else 0
            new = alone - common
            room = tokens + (tree.longest if common > new else 0) - tree.tokens
            if new <= room and (best is None or common > best[0]):
                best = common, tree
        if best is None:
            best = 0, _Tree()
            trees.append(best[1])
        best[1].add(item, share=share)
    return sorted(trees, key=lambda tree: -tree.tokens)  # where memory is short it shows at once


def saved_by_sharing(steps: Sequence[Sequence[Example | Group]], tokens: int) -> float:
    """The share of the tokens of these steps that shared beginnings save."""
    tokens_alone, tokens_with_sharing = (
        sum(tree.tokens for rows in steps for tree in _trees(rows, tokens, share)) for share in (False, True)
    )
    return 1 - tokens_with_sharing / tokens_alone


def fill(steps: Sequence[Sequence[Example | Group]], tokens: int, *, share: bool) -> float:
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
