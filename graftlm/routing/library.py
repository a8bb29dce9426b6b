"""What a router may know of the adapters of a pool: their factors, rows, losses, and how the base sees a text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftlm.adapters.factors import Factors
from graftlm.data.batches.pack import Example
from graftlm.data.chat.render import Renderer
from graftlm.data.quality.preflight import prepare
from graftlm.data.sources.load import load_rows
from graftlm.data.sources.source import DataConfig, Row
from graftlm.errors import AdapterError, RecipeError, nearest
from graftlm.generation.adapter_pool import AdapterPool
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Request
from graftlm.model.registry import Chat
from graftlm.routing.embedding import embedding

Rows = str | Sequence[Row]
"""A source of rows, as training takes it, or rows."""

Score = Callable[[str | None, Sequence[Example]], float]
"""(an adapter, or None for the base; rows) -> how good it is on them."""


class Library:
    """The adapters among which a router chooses, in the order of their names."""

    def __init__(
        self,
        pool: AdapterPool,
        tokenizer: Any,
        among: Sequence[str] = (),
        rows: Mapping[str, Rows] | None = None,
        score: Score | None = None,
    ) -> None:
        """`among`: names of the pool, all without it. `rows`: adapter or task -> its rows, beside those of the config.

        Raises AdapterError for a name that is not registered, and for adapters whose tokenizers contradict each other.
        """
        registered = {one.name: one for one in pool.registered()}
        if unknown := [name for name in among if name not in registered]:
            raise AdapterError(
                f"no adapter {unknown[0]!r} is registered. {nearest(unknown[0], registered)}", code="not-registered"
            )
        self.pool, self.model = pool, pool.model
        self.names = tuple(sorted(among or registered))
        self.fingerprints = tuple(registered[name].fingerprint for name in self.names)
        chats = {registered[name].chat.settings for name in self.names}
        known = chats.pop() if len(chats) == 1 else None
        own = tokenizer.chat_template
        self.chat: Chat | None = known or (Chat(own) if isinstance(own, str) else None)
        """How conversations are rendered before it is known who answers: as all adapters have it, or else the base."""
        self.tokenizer = pool.tokenizer(self.names)
        """That of the adapters; None: that of the base."""
        self._base_tokenizer = tokenizer
        self.given, self._score = dict(rows or {}), score
        self._renderer: Renderer | None = None
        self._engine: Engine | None = None

    @property
    def renderer(self) -> Renderer:
        """What renders rows, and prompts of which it is not known who answers them."""
        if self._renderer is None:
            tokenizer, chat = self.tokenizer or self._base_tokenizer, self.chat
            template = chat.template if chat else self._base_tokenizer.chat_template
            self._renderer = Renderer(
                tokenizer,
                template,
                today=chat.today if chat else None,
                turn_order=chat.turn_order if chat else "refuse",
            )
        return self._renderer

    def factors(self, name: str) -> Factors:
        """Site -> (A, B). Raises AdapterError for an adapter that is not low-rank factors and nothing else."""
        found = self.pool.factors(name)
        if found is None:
            method = self.pool.get(name).method
            raise AdapterError(
                f"{name} ({method}) has no low-rank factors, and a router of tokens mixes these. Leave it out (among), "
                "or route whole requests, for example by `retriever` or `tasks`",
                code="no-low-rank-factors",
            )
        return found

    def embed(self, ids: Sequence[int]) -> Tensor:
        """The base's vector of a prompt [d], of length 1."""
        return embedding(self.model, ids, {})

    def examples(self, name: str, sources: Mapping[str, str], count: int, seed: int) -> list[Example]:
        """At most `count` rows of an adapter or task, drawn by the seed. Raises RecipeError where it has none."""
        source = self.given.get(name, sources.get(name))
        if source is None:
            raise RecipeError(
                f"rows: {name!r} has no rows, and this router learns from some of each. Name a file of rows, or leave "
                "it out (among)",
                code="no-rows-for-router",
            )
        rows = load_rows(source)[0] if isinstance(source, str) else list(source)
        if len(rows) > count:
            rows = [rows[i] for i in np.random.default_rng(seed).choice(len(rows), count, replace=False)]
        train = source if isinstance(source, str) else name
        found, _ = prepare(rows, self.renderer, DataConfig(train=train, strict=True, over_length="truncate"), workers=1)
        return found

    def losses(self, examples: Sequence[Example], adapters: Mapping[str, float]) -> list[float]:
        """-log p of the answer of each row, in nats a token, with these adapters and weights."""
        self._engine = self._engine or Engine(self.model, prepack=False)
        found = [0.0] * len(examples)
        with self.pool.acquire(adapters) as lease:
            asked = [Request(one.ids, 1, adapters=lease.adapters, prompt_logprobs=0) for one in examples]
            for number, generation in self._engine.run(asked):
                known = [0.0 if each is None else each.logprob for each in generation.prompt_logprobs]
                w = torch.from_numpy(examples[number].weights).double()
                w[0] = 0  # nothing predicts the first token
                found[number] = -float((w * torch.tensor(known, dtype=torch.float64)).sum() / w.sum())
        return found

    def score(self, adapter: str | None, examples: Sequence[Example]) -> float:
        """How good an adapter, or the base (None), is on rows: what the caller gave, or else -1 times the mean loss."""
        if self._score is not None:
            return self._score(adapter, examples)
        losses = self.losses(examples, {} if adapter is None else {adapter: 1.0})
        return -sum(losses) / len(losses)


def prompt_of(example: Example) -> Sequence[int]:
    """The ids before the first one that training counts; at least one."""
    first = int(example.weights.nonzero()[0][0]) if example.weights.any() else len(example.ids)
    return list(map(int, example.ids[: max(1, first)]))
