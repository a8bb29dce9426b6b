"""Which adapter of a library is for a task: by words, by example rows, or by the loss on rows.

    words       share of the words of a text that name and description have
    embedding   cos(x - c, y_i - c)     x, y_i [d]: the mean over rows of the base's mean hidden state of a row, of the
                                        rows that are asked about and of the examples of adapter i; c: the mean of y_i
    loss        -log p of the answers in nats a token, of the base with adapter i

The embedding is the retrieval of LoraRetriever (Zhao et al. 2024, arXiv:2402.09997). Not as in the paper: it has a
sentence encoder that was trained for this, ours are the base's own states, less what all have in common (c), because
rows share a template. The loss needs no examples: it chooses among tasks by a small validation set, as LoRAuter does
(arXiv:2601.21795).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from graftlm.data.chat.render import Renderer
from graftlm.data.quality.minhash import words_of
from graftlm.data.sources.convert import to_fields
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.source import DataConfig, Row
from graftlm.data.sources.splits import for_supervised
from graftlm.errors import AdapterError, BaseModelError, GraftError
from graftlm.generation.adapter_pool import AdapterPool, Lease
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.library.entry import EXAMPLES, Entry
from graftlm.library.library import Library
from graftlm.selection.base import Pool, examples_of, hidden_means

By = Literal["embedding", "loss"]

SLOTS = 16
"""Adapters that are on the base at a time."""
MOST_ROWS = 64
"""Rows of a search that are looked at, the first ones."""
EXAMPLES_KEPT = 20
"""Example rows of an adapter: so many has LoraRetriever."""


class Found(NamedTuple):
    """An adapter, and how near it is."""

    name: str
    value: float


class ByRows(NamedTuple):
    """Adapters, the nearest first."""

    by: By
    found: list[Found]
    """Cosines, the largest first; or losses in nats a token, the smallest first."""
    base_loss: float | None
    """The loss of the base alone; None by embedding."""
    left_out: dict[str, str]
    """Adapters that cannot be compared, and why."""
    rows: int
    """How many rows were looked at: the first ones of the file."""


def by_words(entries: Mapping[str, Entry], text: str) -> list[Found]:
    """The adapters with words of the text in name or description, by the share of its words; then by name."""
    wanted = set(words_of(text))
    found = []
    for name, entry in entries.items():
        here = wanted & {*words_of(name.replace("_", " ")), *words_of(entry.description or "")}
        if here:
            found.append(Found(name, len(here) / len(wanted)))
    return sorted(found, key=lambda each: (-each.value, each.name))


def by_rows(
    library: Library,
    rows: str | Path,
    model: Any,
    tokenizer: Any,
    *,
    by: By | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ByRows:
    """The adapters of a library for the rows of a file; the base is loaded already.

    By default by embedding where every adapter has example rows, else by loss: values of the two cannot be compared.
    `progress` gets how many adapters are done, of how many. Raises DataError for rows that cannot be read.
    """
    asked = read_rows(rows)
    if by is None:
        by = "embedding" if all(entry.examples for entry in library.entries.values()) else "loss"
    if by == "embedding":
        return _by_embedding(library, asked, model, tokenizer, progress)
    return _by_loss(library, asked, model, tokenizer, progress)


def read_rows(source: str | Path) -> list[Row]:
    """The first MOST_ROWS rows of a file that have an answer; DataError where there is none."""
    rows, _ = for_supervised(load_rows(str(source))[0])
    return rows[:MOST_ROWS]


def example_rows(source: str | Path) -> list[dict[str, Any]]:
    """The first EXAMPLES_KEPT rows of a file that have an answer, as fields of the messages format."""
    return [dict(to_fields(row)) for row in read_rows(source)[:EXAMPLES_KEPT]]


def nearest_first(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
    """cos(x - c, y_i - c) of x [d] and y [n, d], c the mean of the y_i; without c where there is one y: [n]."""
    c = y.mean(0) if len(y) > 1 else np.zeros_like(x)
    x, y = x - c, y - c
    found: NDArray[np.float64] = (y @ x) / (np.linalg.norm(y, axis=1) * np.linalg.norm(x)).clip(1e-12)
    return found


def _by_embedding(
    library: Library, asked: Sequence[Row], model: Any, tokenizer: Any, progress: Callable[[int, int], None]
) -> ByRows:
    renderer, data = Renderer(tokenizer), DataConfig(train="", over_length="truncate")

    def mean(rows: Sequence[Row]) -> NDArray[Any]:
        pool = Pool(rows, examples_of(rows, renderer, data), renderer, data, lambda: model)
        found: NDArray[Any] = hidden_means(pool)[pool.usable].mean(0)
        return found

    having = [name for name, entry in library.entries.items() if entry.examples]
    if not having:
        raise AdapterError(
            f"{library.folder}: no adapter has example rows (`graft library add --examples`): search by loss",
            code="no-example-rows",
        )
    x, points = mean(asked), []
    for number, name in enumerate(having, start=1):
        points.append(mean(read_rows(library.path(name) / EXAMPLES)))
        progress(number, len(having))
    values = nearest_first(x, np.stack(points)).tolist()
    found = [Found(name, value) for name, value in zip(having, values, strict=True)]
    left_out = {name: "it has no example rows" for name in library.entries if name not in having}
    return ByRows("embedding", sorted(found, key=lambda each: (-each.value, each.name)), None, left_out, len(asked))


def _by_loss(
    library: Library, asked: Sequence[Row], model: Any, tokenizer: Any, progress: Callable[[int, int], None]
) -> ByRows:
    """In one batch over one base: the adapters of a pool, and the engine's log-probabilities of prompts."""
    pool, engine = AdapterPool(model, slots=SLOTS), Engine(model, prepack=False)
    left_out: dict[str, str] = {}
    for name in library.entries:
        try:
            pool.register(name, library.path(name))
        except GraftError as error:
            left_out[name] = str(error)
    names = [name for name in library.entries if name not in left_out]
    found: dict[str | None, float] = {}
    for first in range(0, len(names) + 1, SLOTS):
        some = [None, *names][first : first + SLOTS]
        found |= losses(engine, pool, some, asked, tokenizer, left_out)
        progress(min(first + SLOTS, len(names)), len(names))
    each = [Found(name, value) for name, value in found.items() if name is not None]
    return ByRows("loss", sorted(each, key=lambda one: (one.value, one.name)), found[None], left_out, len(asked))


def losses(
    engine: Engine,
    pool: AdapterPool,
    names: Sequence[str | None],
    rows: Sequence[Row],
    tokenizer: Any,
    left_out: dict[str, str],
) -> dict[str | None, float]:
    """The mean of -log p over the supervised tokens of the rows in nats, for each adapter, and for the base (None).

    Each adapter is asked as in its training: with its own tokenizer and chat template, where it has them. One that has
    a tokenizer without a template goes to `left_out`. All are on the model at once, as many as the pool has slots.
    """
    leases: dict[str | None, Lease] = {}
    try:
        requests, of, weights = [], [], []
        for name in names:
            leases[name] = lease = pool.acquire({} if name is None else name)
            try:
                examples = _rendered(lease, rows, tokenizer)
            except BaseModelError as error:
                if name is None:
                    raise
                left_out[name] = str(error)
                continue
            for example in examples:
                ids = example.ids
                requests.append(Request(ids, 1, adapters=lease.adapters, prompt_logprobs=0))
                of.append(name)
                weights.append(np.asarray(example.weights, np.float64))
        sums = {name: [0.0, 0.0] for name in of}
        for number, generation in engine.run(requests):
            if generation.error is not None:
                raise generation.error
            ln_p = [0.0 if one is None else one.logprob for one in generation.prompt_logprobs]
            w = weights[number]
            sums[of[number]][0] -= float(w[1:] @ np.array(ln_p)[1:])
            sums[of[number]][1] += float(w[1:].sum())
        return {name: total / count for name, (total, count) in sums.items()}
    finally:
        for lease in leases.values():
            lease.release()


def _rendered(lease: Lease, rows: Sequence[Row], tokenizer: Any) -> list[Any]:
    chat = lease.chat
    tokenizer = tokenizer if lease.tokenizer is None else lease.tokenizer
    template = tokenizer.chat_template if chat is None else chat.template
    today, turn_order = (None, "refuse") if chat is None else (chat.today, chat.turn_order)
    renderer = Renderer(tokenizer, template, today=today, turn_order=turn_order)
    data = DataConfig(train="", over_length="error", strict=True)
    return [example for row in examples_of(rows, renderer, data) for example in row]
