"""What is asked of an engine, and what comes of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from graftlm.errors import RequestError
from graftlm.generation.grammar import CompiledGrammar
from graftlm.generation.logprobs import TokenLogprob
from graftlm.generation.sampling import GREEDY, Sampling
from graftlm.model.routes import Row

if TYPE_CHECKING:
    from graftlm.generation.engine import Engine

Ids = Sequence[int] | np.ndarray[Any, np.dtype[np.int32]]

Finish = Literal["stop", "length", "cancelled", "deadline", "error"]
"""Why an answer is complete: it ended by itself, it is as long as it may be, its caller cancelled it, its time was up,
or its pass failed."""


RowKey = tuple[tuple[str, float, int], ...]
"""(name of a delta, its weight, the count of changes when it was attached) for each that acts."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be answered."""

    ids: Ids
    """The prompt: one id at least."""
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: Sequence[int] = ()
    """An answer ends with the first of these."""
    stop_when: Callable[[list[int]], bool] | None = None
    """Of the new ids so far: whether they are a complete answer."""
    adapters: Sequence[str] | Row | None = None
    """Deltas on the model by name, in the order in which they act, each with its weight or with 1; () is the bare base.
    None: those that are active when the request is submitted."""
    deadline: float | None = None
    """The time, as `time.monotonic` counts, at which an incomplete answer ends as it is."""
    on_token: Callable[[int], None] | None = None
    """Called with each new id as it comes, by the thread that runs the pass."""
    logprobs: int | None = None
    """Whether to give the log-probabilities of new ids (0), and those of how many of the likeliest ids (1 and more)."""
    prompt_logprobs: int | None = None
    """The same of the prompt's own ids, from `prompt_logprobs_from` on."""
    prompt_logprobs_from: int = 0
    """The number of the first id of the prompt whose log-probability is wanted. What stands before it is computed once
    for all requests that begin with it."""
    grammar: CompiledGrammar | None = None
    """What the answer must be. It ends where the grammar allows nothing more, and ids in `stop_ids` end it only where
    the grammar allows an end."""

    def several(self, count: int) -> "list[Request]":
        """`count` requests for answers of one prompt: the i-th is drawn with the seed `seed` + i."""
        sampling = self.sampling
        return [replace(self, sampling=replace(sampling, seed=sampling.seed + i)) for i in range(count)]

    def check(self, model: Any) -> None:
        """Raise ValueError for a request that is none, RequestError for one that this model cannot answer."""
        if len(self.ids) == 0 or self.max_new_tokens < 1:
            raise ValueError("a request needs one id at least, and max_new_tokens one at least")
        if not 0 <= self.prompt_logprobs_from < len(self.ids):
            raise ValueError(f"prompt_logprobs_from is {self.prompt_logprobs_from}, and the ids are {len(self.ids)}")
        size = model.config.get_text_config().vocab_size
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not 0 <= count <= size:
                raise RequestError(
                    f"{name}: {count} of the likeliest ids are asked for, and the model has {size}: give 0 for the "
                    "tokens alone, or a number up to that",
                    code="too-many-logprobs",
                )
        beyond = next((token for token, _ in self.sampling.logit_bias if token >= size), None)
        if beyond is not None:
            raise RequestError(
                f"logit_bias: the model has the ids 0 to {size - 1}, so {beyond} is none of its tokens",
                code="unknown-token-id",
            )
        if self.grammar is not None and not set(self.stop_ids) <= set(self.grammar.stop_ids):
            raise ValueError(
                f"stop_ids {list(self.stop_ids)}: the grammar was compiled for {list(self.grammar.stop_ids)}, and "
                "allows no others where it ends; give its GrammarCompiler the stop ids of the request"
            )
        if self.prompt_logprobs is not None and getattr(model.config, "is_encoder_decoder", False):
            raise RequestError(
                "prompt_logprobs: the model reads prompts with an encoder, which gives no probabilities of them: leave "
                "prompt_logprobs (echo with logprobs) out",
                code="no-prompt-logprobs",
            )


@dataclass(eq=False)
class Generation:
    """A request that was submitted, and its answer so far."""

    request: Request
    engine: "Engine"
    row: Row
    """The deltas that act on it."""
    key: RowKey
    """The same, with what tells a delta from a later one of its name."""
    ids: list[int] = field(default_factory=list)
    """The new ids, with the one that ended the answer."""
    finish: Finish | None = None
    """None while there is more to come."""
    error: Exception | None = None
    """Why the pass failed."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each of `ids`, where the request wants them."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """One for each id of the prompt as far as it is read, None for the first one and for those before
    `prompt_logprobs_from`, where the request wants them."""

    @property
    def answer_ids(self) -> list[int]:
        """The new ids without the stop id."""
        ended = self.finish == "stop" and self.ids and self.ids[-1] in self.request.stop_ids
        return self.ids[:-1] if ended else list(self.ids)

    def cancel(self) -> None:
        """End the answer as it is. All that it holds is free when the pass that is going on, if any, is over."""
        self.engine.cancel(self)

    def add(self, token: int, logprob: TokenLogprob | None = None, *, is_last: bool = False) -> None:
        """Append a new id, and look whether the answer is complete; `is_last` says that it is."""
        if self.finish is not None:  # cancelled while its token was computed
            return
        request = self.request
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        try:
            if request.on_token is not None:
                request.on_token(token)
            ended = is_last or token in request.stop_ids
            ended = ended or (request.stop_when is not None and request.stop_when(self.ids))
        except Exception as error:  # of the caller's functions
            self.fail(error)
            return
        if self.finish is None and ended:
            self.finish = "stop"
        elif self.finish is None and len(self.ids) == request.max_new_tokens:
            self.finish = "length"

    def fail(self, error: Exception) -> None:
        if self.finish is None:
            self.error, self.finish = error, "error"

    def expire(self) -> None:
        """Finish where the deadline is over."""
        if self.finish is None and self.request.deadline is not None and time.monotonic() >= self.request.deadline:
            self.finish = "deadline"
