"""What every way of choosing rows has: a config, and one function from a pool of rows to a score for each.

    score(config, pool) -> float32 [n]      higher is kept first; -inf is left out, however many are wanted

A method that chooses sets says in which order it would take the rows: an order is a score (`from_order`), so how many
are kept can be changed without asking again. What several methods need of a model is here: the loss of each row, and
an embedding of each row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Annotated, Any, Union

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, Strict

from graftlm.config.schema import PositiveCount, config
from graftlm.data.batches.pack import Example, Pack, lay_out
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.roles import Rendered, Role
from graftlm.data.quality.preflight import prepare
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.source import DataConfig, Row, SourceConfig
from graftlm.data.sources.splits import for_supervised
from graftlm.passes.forward import hidden_states, log_probs
from graftlm.passes.packed_attention import packed_attention

Scores = NDArray[np.float32]
LEFT_OUT = -np.inf

PositiveShare = Annotated[float, Strict(), Field(gt=0, le=1)]


def _is_a_number(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError("say how many rows (100) or which share of them (0.1, which is a tenth)")
    return value


Keep = Annotated[Union[PositiveCount, PositiveShare], BeforeValidator(_is_a_number)]  # noqa: UP007 (pydantic shows so)


@config
class SelectorConfig:
    """What every method has."""

    by: str
    keep: Keep | None = None
    """How many rows (100), or which share of those that it was given (0.1, and 1.0 is all). A method that only leaves
    rows out needs none."""


@dataclass
class Pool:
    """Rows to choose from, and what a method may ask about them."""

    rows: Sequence[Row]
    examples: Sequence[Sequence[Example]]
    """The examples of each row, as training would see them; none for a row that is too long."""
    renderer: Renderer
    data: DataConfig
    load: Callable[[], Any]
    """The base, loaded once and proved; a method that does not ask for it needs no weights."""
    pack_tokens: int = 1024
    network: bool = False
    check_positions: Callable[[Sequence[Example], str], None] = lambda examples, what: None
    """Raises DataError for examples that are longer than the positions of the base; a method calls it with what it
    gives the base beside `examples`, and with a name for them."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    notes: list[str] = field(default_factory=list)
    """What a method wants to have said."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def model(self) -> Any:
        return self.load()

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Which rows are not too long: [n]."""
        return np.array([len(examples) > 0 for examples in self.examples], bool)

    def rendered(self) -> Iterator[tuple[int, Rendered]]:
        """Every row's number and tokens with their roles; a row may be rendered as several."""
        for number, row in enumerate(self.rows):
            for rendered in self.renderer.rows(row.messages, row.tools, row.variables):
                yield number, rendered
            self.progress("rendering", number + 1, len(self))

    def part(self, indices: Iterable[int]) -> "Pool":
        """The pool of some of its rows."""
        indices = list(indices)
        return replace(self, rows=[self.rows[i] for i in indices], examples=[self.examples[i] for i in indices])

    def other(self, source: str | SourceConfig) -> "Pool":
        """The rows of another source, seen in the same way; raises DataError as reading and rendering do."""
        rows, _ = for_supervised(load_rows(source, network=self.network, turn_order=self.data.turn_order)[0])
        examples = examples_of(rows, self.renderer, self.data)
        self.check_positions([example for row in examples for example in row], "rows of the target")
        return replace(self, rows=rows, examples=examples)

    def packs(self, examples: Sequence[Example]) -> Iterator[Pack]:
        """The forward passes over some examples, on the model's device."""
        for pack in lay_out(examples, self.pack_tokens, packed=self.data.pack):
            yield pack.to(self.model.device)

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Held over passes, and over their backward passes."""
        with packed_attention(self.model) if self.data.pack else nullcontext():
            yield


def examples_of(rows: Sequence[Row], renderer: Renderer, data: DataConfig) -> list[list[Example]]:
    """The examples of each row; none for one that is longer than max_tokens where such rows are dropped."""
    all_examples, _ = prepare(rows, renderer, data)
    queue = all_examples[::-1]
    found: list[list[Example]] = []
    for where, same in groupby(rows, lambda row: row.where):  # examples come in the order of their rows
        copies, examples = len(list(same)), list[Example]()
        while queue and queue[-1].where == where:
            examples.append(queue.pop())
        each = len(examples) // copies  # a row of more weight comes several times
        found += [examples[i * each : (i + 1) * each] for i in range(copies)]
    assert not queue, "every example belongs to a row"
    return found


def last_answer(rendered: Rendered) -> tuple[int, int]:
    """Where the last answer's own tokens begin and end; at the row's end where it has none."""
    in_answer = rendered.roles == Role.ASSISTANT
    if not in_answer.any():
        return len(in_answer), len(in_answer)
    end = int(np.flatnonzero(in_answer)[-1]) + 1
    others = np.flatnonzero(~in_answer[:end])
    return int(others[-1]) + 1 if len(others) else 0, end


def from_order(order: Sequence[int] | NDArray[Any], count: int) -> Scores:
    """Scores that keep rows in this order, the first with the highest; whoever is not in it is left out."""
    scores = np.full(count, LEFT_OUT, np.float32)
    scores[np.asarray(order, np.int64)] = np.arange(len(order), 0, -1, dtype=np.float32)
    return scores


@torch.no_grad()
def losses(pool: Pool, examples: Sequence[Example], what: str) -> NDArray[np.float64]:
    """-log p of the supervised tokens of each example, their weighted mean in nats: [len(examples)]."""
    sums, weights = torch.zeros(2, len(examples), dtype=torch.float64)
    done = 0
    with pool.attention():
        for pack in pool.packs(_numbered(examples)):
            numbers = torch.tensor([int(where[0]) for where in pack.where])[pack.segment_of]
            weight = pack.weights.cpu().double()
            sums.index_add_(0, numbers, -weight * log_probs(pool.model, pack).cpu().double())
            weights.index_add_(0, numbers, weight)
            done += len(pack.where)
            pool.progress(what, done, len(examples))
    found: NDArray[np.float64] = (sums / weights).numpy()
    return found


def row_losses(pool: Pool, what: str) -> NDArray[np.float64]:
    """The mean loss of each row in nats a supervised token [n], over all its examples; nan for one that is too long."""
    flat = [(number, example) for number, row in enumerate(pool.examples) for example in row]
    owner = np.array([number for number, _ in flat], np.int64)
    weight = np.array([example.weights.sum() for _, example in flat])
    each = losses(pool, [example for _, example in flat], what)
    with np.errstate(invalid="ignore"):
        found: NDArray[np.float64] = np.bincount(owner, each * weight, len(pool)) / np.bincount(
            owner, weight, len(pool)
        )
    return found


def embeddings(pool: Pool) -> NDArray[np.float32]:
    """The mean of the base's last hidden states over each row's tokens, less the pool's mean, of length 1: [n, d].

    Without taking the mean away all rows look alike: they share a template, and hidden states share a large part. Zero
    for rows that are too long.
    """
    means = hidden_means(pool)
    return directions(means, means[pool.usable].mean(0)) * pool.usable[:, None]


def directions(points: NDArray[np.float32], centre: NDArray[np.float32]) -> NDArray[np.float32]:
    """Points [n, d] seen from a centre [d], of length 1."""
    away = points - centre
    found: NDArray[np.float32] = away / np.linalg.norm(away, axis=1, keepdims=True).clip(1e-12)
    return found


@torch.no_grad()
def hidden_means(pool: Pool, *, late: bool = False) -> NDArray[np.float32]:
    """The mean of the base's last hidden states over each row's tokens [n, d]; with `late`, token i of n has the weight
    i / (1 + ... + n). A row's last token is not among those that count, because training never computes it. Zero for
    rows that are too long."""
    flat = [(number, example) for number, row in enumerate(pool.examples) for example in row]
    sums, weights = torch.zeros(len(pool), pool.model.config.get_text_config().hidden_size), torch.zeros(len(pool), 1)
    done = 0
    with pool.attention():
        for pack in pool.packs(_numbered([example for _, example in flat])):
            hidden = hidden_states(pool.model, pack).float().cpu()
            for where, piece in zip(pack.where, hidden.split(pack.lengths), strict=True):
                number = flat[int(where[0])][0]
                weight = torch.arange(1.0, len(piece) + 1) if late else torch.ones(len(piece))
                sums[number] += weight @ piece
                weights[number] += weight.sum()
            done += len(pack.where)
            pool.progress("embedding", done, len(flat))
    found: NDArray[np.float32] = (sums / weights.clamp(min=1)).numpy()
    return found


def _numbered(examples: Sequence[Example]) -> list[Example]:
    """Examples whose `where` is their number, so that they are found again in packs."""
    return [Example(e.ids, e.weights, str(number)) for number, e in enumerate(examples)]
