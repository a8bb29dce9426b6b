"""How much adapters of one base have in common, from their changes alone.

    cosine(i, j) = sum_s <D_i, D_j> / (||D_i|| ||D_j||)       ||D_i||^2 = sum_s <D_i, D_i>      s over the sites
    left(i, j)   = mean_s ||U_i^T U_j||_F^2 / min(r_i, r_j)                                     right: V in place of U

D_i = s_i B_i A_i [d_out, d_in] is the change of adapter i at a site, and D_i = U_i S_i V_i^T its singular value
decomposition, of rank r_i: U_i [d_out, r_i], V_i [d_in, r_i]. With W_i = U_i S_i, <D_i, D_j> = sum((W_i^T W_j) *
(V_i^T V_j)): no matrix of the layer's size is made. D_i is the same for (B_i R, R^-1 A_i), so all three are.

The cosine is 1 for an adapter times any positive number. Of subspaces of dimensions r_i >= r_j that are drawn at random
the overlap is r_i / d, so what is near that means nothing. A site that one of the two does not change has cosine 0 and
overlap 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftlm.adapters.adapter import Adapter
from graftlm.adapters.tensors import PREFIX, widened
from graftlm.combine.changes import Changes, changes_of
from graftlm.combine.core import Change, numerical_rank
from graftlm.errors import AdapterError, GraftError
from graftlm.library.entry import Entry
from graftlm.model.sites import pattern_matches

CHUNK_BYTES = 2**26
"""Of the blocks of inner products that are in memory at a time."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Similarities:
    """Of n adapters."""

    names: Sequence[str]
    cosine: Matrix
    """[n, n], each from -1 to 1."""
    left: Matrix
    """[n, n]: overlap of the spaces that the changes write to, from 0 to 1."""
    right: Matrix
    """[n, n]: overlap of the spaces that they read from."""
    norms: NDArray[np.float64]
    """[n]: ||D_i||."""
    left_out: Mapping[str, str]
    """Adapters that cannot be compared, and why."""


class Pair(NamedTuple):
    """Two adapters that are nearly one."""

    one: str
    other: str
    cosine: float
    left: float
    right: float
    norm_ratio: float
    """||D_one|| / ||D_other||."""

    def of(self, name: str) -> str:
        """The other one of the two."""
        return self.other if name == self.one else self.one


@torch.no_grad()
def similarities(adapters: Mapping[str, Adapter], model: Any = None) -> Similarities:
    """The similarities of adapters of one base, by their names.

    With the base, all adapters that change weight matrices are compared; without one, plain LoRA, whose change is in
    its file. The others, and those that change nothing, are left out.
    """
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        changes = {}
        for name, adapter in adapters.items():
            try:
                made = lora_changes(adapter) if model is None else stack.enter_context(_on(model, adapter, name))
            except GraftError as error:
                left_out[name] = str(error)
                continue
            if made is None:
                left_out[name] = "no plain LoRA: its change is known on the base alone (--base)"
            else:
                changes[name] = made
        sums = _Sums(len(changes))
        for site in dict.fromkeys(site for each in changes.values() for site in each):
            here = {n: each[site]() for n, each in enumerate(changes.values()) if site in each}
            for some in _by_shape(here):
                sums.add(some)
    found = sums.similarities(list(changes))
    still = [n for n, norm in enumerate(found.norms) if norm == 0]
    left_out |= {found.names[n]: "it changes nothing" for n in still}
    keep = [n for n in range(len(found.names)) if n not in still]
    at = np.ix_(keep, keep)
    return Similarities(
        [found.names[n] for n in keep], found.cosine[at], found.left[at], found.right[at], found.norms[keep], left_out
    )


def near_duplicates(found: Similarities, threshold: float, apart: Mapping[str, Any] | None = None) -> list[Pair]:
    """The pairs with a cosine of `threshold` or more, the nearest first. Two names with different values in `apart`,
    neither of them None, are no pair: adapters of different bases."""
    groups = apart or {}
    pairs = []
    for i, one in enumerate(found.names):
        for j in (np.flatnonzero(found.cosine[i, i + 1 :] >= threshold) + i + 1).tolist():
            other = found.names[j]
            bases = groups.get(one), groups.get(other)
            if None not in bases and bases[0] != bases[1]:
                continue
            cosine, left, right = (float(each[i, j]) for each in (found.cosine, found.left, found.right))
            pairs.append(Pair(one, other, cosine, left, right, float(found.norms[i] / found.norms[j])))
    return sorted(pairs, key=lambda pair: (-pair.cosine, pair.one, pair.other))


class Pruning(NamedTuple):
    """What pruning would do."""

    out: dict[str, str]
    """Adapter that goes -> the near-duplicate that stays in its place."""
    undecided: list[Pair]
    """Pairs of which one has no score, or both have none: both stay."""


def prune(pairs: Sequence[Pair], scores: Mapping[str, float], *, lowest_is_best: bool = False) -> Pruning:
    """Of near-duplicates the ones with the worse scores; of equal ones the later names.

    From the best score on, each adapter stays, and its near-duplicates that are left go. So whatever goes has a
    near-duplicate that stays and is as good or better; nearness is not handed on from one to the next.
    """
    near: dict[str, set[str]] = {}
    for pair in pairs:
        near.setdefault(pair.one, set()).add(pair.other)
        near.setdefault(pair.other, set()).add(pair.one)
    sign = 1 if lowest_is_best else -1
    out: dict[str, str] = {}
    for name in sorted((name for name in near if name in scores), key=lambda name: (sign * scores[name], name)):
        if name not in out:
            worse = (other for other in near[name] if other in scores and other not in out)
            out |= {other: name for other in worse if (sign * scores[other], other) > (sign * scores[name], name)}
    undecided = [
        pair
        for pair in pairs
        if not {pair.one, pair.other} <= scores.keys() and not {pair.one, pair.other} & out.keys()
    ]
    return Pruning(out, undecided)


def score_named(entries: Mapping[str, Entry], score: str | None) -> tuple[str, dict[str, float]]:
    """(the name of a score, its value of each adapter that has it); the only one that there is by default.

    Raises AdapterError for a score that no adapter has, and where there are several and none is named.
    """
    known = sorted({name for entry in entries.values() for name in entry.scores})
    if score is None and len(known) == 1:
        score = known[0]
    if score not in known:
        said = "no adapter has a score" if not known else f"say which score decides: {', '.join(known)}"
        raise AdapterError(
            f"{said if score is None else f'no adapter has a score {score!r}'}. Scores are given when an adapter is "
            "added: --score NAME=VALUE",
            code="no-such-score",
        )
    return score, {name: entry.scores[score].value for name, entry in entries.items() if score in entry.scores}


# The changes of an adapter ------------------------------------------------------------------------------------------


def lora_changes(adapter: Adapter) -> Changes | None:
    """The changes of a plain LoRA from its file: site -> what makes its change. None for other adapters, and for a LoRA
    with more than its factors: magnitudes of DoRA, biases, whole modules."""
    stored, tensors = adapter.peft_config, adapter.tensors
    if stored.get("peft_type") != "LORA":
        return None
    found = {}
    for end_A, end_B in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
        for key in [key for key in tensors if key.endswith(end_A)]:
            B = tensors.get(key.removesuffix(end_A) + end_B)
            if B is None or tensors[key].dim() != 2 or B.dim() != 2:
                return None
            site = key.removesuffix(end_A)
            found[site] = partial(_change, tensors[key], B, _scale(stored, site.removeprefix(PREFIX), tensors[key]))
    return found if found and 2 * len(found) == len(tensors) else None


def _change(A: Tensor, B: Tensor, scale: float) -> Change:
    return Change(widened(A), widened(B), scale)


def _scale(stored: Mapping[str, Any], site: str, A: Tensor) -> float:
    """alpha / r, or alpha / sqrt(r) of rsLoRA; both as PEFT has them at this site."""
    patterns = (stored.get("alpha_pattern") or {}).items()
    alpha = next((value for pattern, value in patterns if pattern_matches(pattern, site)), stored.get("lora_alpha", 8))
    r = len(A)
    return float(alpha) / (r**0.5 if stored.get("use_rslora") else r)


@contextmanager
def _on(model: Any, adapter: Adapter, name: str) -> Iterator[Changes]:
    with changes_of(model, adapter, f"graft-library-{name}".replace(".", "-"), needs_rank=False) as changes:
        yield changes


# Sums over sites ----------------------------------------------------------------------------------------------------


def _by_shape(changes: Mapping[int, Change]) -> list[dict[int, Change]]:
    """Adapters of several bases may have a site of one name and different sizes: these have nothing in common."""
    found: dict[tuple[int, int], dict[int, Change]] = {}
    for number, change in changes.items():
        found.setdefault((change.B.shape[0], change.A.shape[1]), {})[number] = change
    return list(found.values())


class _Sums:
    """Sums over sites of what pairs of n adapters have in common."""

    def __init__(self, n: int) -> None:
        self.inner, self.left, self.right = (np.zeros((n, n)) for _ in range(3))
        self.sites = np.zeros((n, n))
        """How many sites both change."""
        self.own = np.zeros(n)

    def add(self, changes: Mapping[int, Change]) -> None:
        """A site."""
        triples = {number: made for number, change in changes.items() if (made := _svd(change)) is not None}
        if not triples:
            return
        at = np.array(list(triples))
        U, W, V = (torch.cat([t[part] for t in triples.values()], dim=1) for part in range(3))
        ranks = np.array([t[0].shape[1] for t in triples.values()])
        ends = np.cumsum(ranks)
        starts = ends - ranks
        rows = max(1, CHUNK_BYTES // (8 * int(ends[-1])))
        first = 0
        while first < len(at):
            last = max(first + 1, int(np.searchsorted(ends, starts[first] + rows, side="right")))
            part, cut = slice(int(starts[first]), int(ends[last - 1])), starts[first:last] - starts[first]
            left, right = U[:, part].T @ U, V[:, part].T @ V
            where = np.ix_(at[first:last], at)
            self.inner[where] += _blocks((W[:, part].T @ W) * right, cut, starts)
            smaller = np.minimum(ranks[first:last, None], ranks)
            self.left[where] += _blocks(left.square_(), cut, starts) / smaller
            self.right[where] += _blocks(right.square_(), cut, starts) / smaller
            self.sites[where] += 1
            first = last
        self.own[at] += 1

    def similarities(self, names: Sequence[str]) -> Similarities:
        norms = np.sqrt(np.diag(self.inner).clip(0))
        either = (self.own[:, None] + self.own - self.sites).clip(1)
        cosine = self.inner / np.outer(norms, norms).clip(np.finfo(float).tiny)
        return Similarities(names, cosine.clip(-1, 1), self.left / either, self.right / either, norms, {})


def _svd(change: Change) -> tuple[Tensor, Tensor, Tensor] | None:
    """U [d_out, r], U S [d_out, r] and V [d_in, r] of the change, of its rank; None where it is 0."""
    Q, R = torch.linalg.qr(change.B.double())
    P, L = torch.linalg.qr(change.A.double().T)
    X, S, Yh = torch.linalg.svd(change.scale * R @ L.T)
    if S[0] == 0:
        return None
    r = numerical_rank(S)
    U = Q @ X[:, :r]
    return U, U * S[:r], P @ Yh[:r].T


def _blocks(products: Tensor, rows: NDArray[Any], columns: NDArray[Any]) -> Matrix:
    """The sums of the blocks that begin at these rows and columns."""
    by_row = np.add.reduceat(products.numpy(), rows, axis=0)
    found: Matrix = np.add.reduceat(by_row, columns, axis=1)
    return found
