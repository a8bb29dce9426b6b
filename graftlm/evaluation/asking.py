"""What a task asks an engine, and what comes of the answers.

Models are rows of deltas over one base: their requests stand in one batch. The choices of an item are requests with a
common beginning, which the engine computes once for each model.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graftlm.data.chat.render import Renderer
from graftlm.errors import DataError
from graftlm.evaluation.metrics import Choice, Likelihood, Outcome
from graftlm.evaluation.task import Item, Task
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Generation, Request
from graftlm.generation.text_stream import TextPiece, TextStream
from graftlm.hub.stopping import all_stop_ids
from graftlm.hub.tokenizer import embedding_rows, with_more_tokens
from graftlm.model.registry import Chat, attachment
from graftlm.model.routes import Row

TIES = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.1}
"""Dtype of a model -> nats: of tokens or choices that are as near as this, rounding may decide, so another batch may
choose another. About the rounding of a logit of 16."""

Found = dict[str, Any]
"""An outcome as it stands in a journal."""


@dataclass(frozen=True)
class Asked:
    """A model: deltas over the base, and what renders its prompts."""

    name: str
    row: Row
    renderer: Renderer
    stop_ids: tuple[int, ...]
    tie: float
    """What counts as a near tie, in nats."""


def tie_of(model: Any) -> float:
    return TIES.get(model.dtype, max(TIES.values()))


def asked_models(model: Any, tokenizer: Any, rows: Mapping[str, Row]) -> list[Asked]:
    """Each row with the tokenizer and the chat template of its adapters, where these have their own."""
    record, found = attachment(model), list[Asked]()
    renderers: dict[tuple[int, Chat | None], Renderer] = {}
    for name, row in rows.items():
        own, chat = tokenizer, None
        for adapter in row:
            if adapter in record.tokenizers:
                own = with_more_tokens(own, record.tokenizers[adapter], embedding_rows(model), adapter)
            chat = record.chats.get(adapter, chat)
        renderer = renderers.setdefault((id(own), chat), renderers.get((id(own), chat)) or _renderer(own, chat))
        found.append(Asked(name, row, renderer, all_stop_ids(model, renderer.stop_ids), tie_of(model)))
    return found


def _renderer(tokenizer: Any, chat: Chat | None) -> Renderer:
    if chat is None:
        return Renderer(tokenizer)
    return Renderer(tokenizer, chat.template, today=chat.today, turn_order=chat.turn_order)


@dataclass(frozen=True)
class Question:
    """The requests of an item for one model and one template, and what makes an outcome of the answers."""

    item: int
    model: str
    template: int
    requests: Sequence[Request]
    read: Callable[[Sequence[Generation]], Found]


def questions(task: Task, models: Sequence[Asked], numbers: Sequence[int]) -> Iterator[Question]:
    """Of these items: every template for every model."""
    make = {"generate": _generate, "choice": _choose, "likelihood": _likelihood}[task.config.kind]
    for number in numbers:
        for template in range(task.templates):
            for model in models:
                yield make(task, model, number, template)


def answers(model: Any, asked: Sequence[Question]) -> list[Found]:
    """The outcome of each question. They depend on these questions alone, to the bit: the engine is a new one."""
    flat = [request for question in asked for request in question.requests]
    engine = Engine(model, prepack=False)
    generations: list[Generation | None] = [None] * len(flat)
    for number, generation in engine.run(flat):
        generations[number] = generation
    found, begin = [], 0
    for question in asked:
        own = generations[begin : begin + len(question.requests)]
        begin += len(own)
        found.append(question.read([each for each in own if each is not None]))
    return found


def outcome(task: Task, item: Item, template: int, found: Found) -> Outcome:
    """What metrics measure, from what the journal holds."""
    if task.config.kind == "generate":
        return item.answer(found["text"], template)
    if task.config.kind == "choice":
        unconditional = found.get("unconditional")
        return Choice(
            tuple(found["log_probs"]),
            item.choices,
            item.gold,
            None if unconditional is None else tuple(unconditional),
            item.where,
        )
    return Likelihood(found["log_prob"], found["tokens"], item.references[0], found["greedy"], item.where)


# Kinds ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Text:
    """The text of an answer, which may end before a stop text."""

    stream: TextStream
    stop_ids: Sequence[int]
    pieces: list[str] = field(default_factory=list)

    def add(self, token: int) -> None:
        if token not in self.stop_ids:
            self._take(self.stream.add(token))

    def close(self) -> str:
        self._take(self.stream.close())
        return "".join(self.pieces)

    def _take(self, piece: TextPiece | None) -> None:
        if piece is not None:
            self.pieces.append(piece.text)


def _generate(task: Task, model: Asked, number: int, template: int) -> Question:
    config, item = task.config, task.items[number]
    text = _Text(TextStream(model.renderer.tokenizer, config.stop), model.stop_ids)
    request = Request(
        _prompt(task, model, item, template),
        config.max_new_tokens,
        stop_ids=model.stop_ids,
        stop_when=(lambda ids: text.stream.stopped_by is not None) if config.stop else None,
        adapters=model.row,
        on_token=text.add,
        logprobs=2,
    )

    def read(generations: Sequence[Generation]) -> Found:
        (generation,) = generations
        margins = [each.likeliest[0][1] - each.likeliest[1][1] for each in generation.logprobs]
        return {
            "text": text.close().strip(),
            "tokens": len(generation.ids),
            "cut": generation.finish == "length",
            "near_tie": min(margins, default=math.inf) < model.tie,
        }

    return Question(number, model.name, template, [request], read)


def _choose(task: Task, model: Asked, number: int, template: int) -> Question:
    item = task.items[number]
    prompt = _prompt(task, model, item, template)
    beside = task.needs_unconditional
    pairs = [_continued(task, model, item, template, prompt, choice) for choice in item.choices]
    if beside:
        begin = _begin(model, item.where)
        pairs += [([*begin, *ids[start:]], len(begin)) for ids, start in pairs]
    requests = [_scored(model, ids, start) for ids, start in pairs]

    def read(generations: Sequence[Generation]) -> Found:
        sums = [_log_prob(each) for each in generations]
        found, unconditional = sums[: len(item.choices)], sums[len(item.choices) :]
        best, second = sorted(found, reverse=True)[:2]
        return {
            "log_probs": found,
            "near_tie": best - second < model.tie,
            **({"unconditional": unconditional} if beside else {}),
        }

    return Question(number, model.name, template, requests, read)


def _likelihood(task: Task, model: Asked, number: int, template: int) -> Question:
    item = task.items[number]
    empty = item.prompts[template][-1].content == "" and len(item.prompts[template]) == 1
    if empty:
        prompt = _begin(model, item.where)
        ids = [*prompt, *_ids(model, item.references[0])]
        start = len(prompt)
    else:
        ids, start = _continued(task, model, item, template, _prompt(task, model, item, template), item.references[0])

    def read(generations: Sequence[Generation]) -> Found:
        (generation,) = generations
        wanted = list(zip(generation.request.ids, generation.prompt_logprobs, strict=True))[start:]
        gaps = [each.likeliest[0][1] - each.logprob for token, each in wanted if each and each.likeliest[0][0] != token]
        return {
            "log_prob": _log_prob(generation),
            "tokens": len(wanted),
            "greedy": not gaps,
            "near_tie": min(gaps, default=math.inf) < model.tie,
        }

    return Question(number, model.name, template, [_scored(model, ids, start, likeliest=1)], read)


# Ids -----------------------------------------------------------------------------------------------------------------


def _prompt(task: Task, model: Asked, item: Item, template: int) -> list[int]:
    messages = item.prompts[template]
    if not task.config.chat:
        found = list(map(int, model.renderer.tokenizer(messages[0].content)["input_ids"]))
        return found or _begin(model, item.where)
    return list(map(int, model.renderer.prompt(messages, item.tools, item.variables)))


def _continued(
    task: Task, model: Asked, item: Item, template: int, prompt: list[int], text: str
) -> tuple[list[int], int]:
    """(prompt and continuation as ids, the number of the first id of the continuation).

    After a chat template the continuation is tokenized by itself. Without one the text is tokenized as a whole; the
    first id that is not the prompt's begins the continuation, though it may hold the end of the prompt.
    """
    text = task.config.between + text
    if task.config.chat:
        ids = [*prompt, *_ids(model, text)]
        start = len(prompt)
    else:
        whole = item.prompts[template][0].content + text
        ids = list(map(int, model.renderer.tokenizer(whole)["input_ids"]))
        start = next(
            (n for n, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids))
        )
        if start == 0:  # without a token that begins texts: nothing predicts the first one
            begin = _begin(model, item.where)
            ids, start = [*begin, *ids], len(begin)
    if len(ids) == start:
        raise DataError(
            f"{item.where}: the continuation {text!r:.60} has no tokens, so it has no likelihood", code="empty-choice"
        )
    return ids, start


def _ids(model: Asked, text: str) -> list[int]:
    return list(map(int, model.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]))


def _begin(model: Asked, where: str) -> list[int]:
    """The token that begins a text: BOS, else EOS, as lm-eval has it."""
    tokenizer = model.renderer.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise DataError(
            f"{where}: the tokenizer has neither a token that begins a text nor one that ends it, so the first token "
            "of a text has no likelihood: give the task a `prompt`",
            code="no-first-token",
        )
    return [int(first)]


def _scored(model: Asked, ids: list[int], start: int, *, likeliest: int = 0) -> Request:
    return Request(ids, 1, adapters=model.row, prompt_logprobs=likeliest, prompt_logprobs_from=start)


def _log_prob(generation: Generation) -> float:
    """The sum of ln p from the first id that was asked for."""
    return math.fsum(each.logprob for each in generation.prompt_logprobs if each is not None)
