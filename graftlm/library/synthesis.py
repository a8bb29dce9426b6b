"""Rows of an adapter's task, made by the adapter itself: questions from a few seeds, answers, a filter.

Trans-LoRA: Wang et al. 2024, arXiv:2405.17258.

    x ~ p_base(. | a few of the seeds)          questions
    y = argmax p_{base + adapter}(. | x)        answers, greedily
    keep (x, y) where s(x, y) >= min over the first 32 seeds x_j of s(x_j, y_j)
    s(x, y) = mean_t log p_{base + adapter}(y_t | x, y_<t)      nats a token, the token that ends the answer included

Not as in the paper:
- The paper has a discriminator, a LoRA on the source base, that tells the questions of the training rows from synthetic
  ones and is trained together with the adapter. An adapter that comes without one has no such rows any more. Here the
  filter is s: an adapter is less sure of its answers to questions of other kinds, and the seeds say how sure it is of
  its own.
- In the paper's transfer the target base writes the questions. Here the source base does: one model is in memory, and
  the rows do not depend on the target.
- Five seeds in a prompt are the paper's; the words of the prompt are ours.

Not checked against the paper itself, of which only its abstract, figure 1 and summaries were at hand: its number of
rows, its temperature, and that five seeds stand in a prompt.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from graftlm.config.schema import Count, Flag, PositiveCount, PositiveRate, config
from graftlm.data.batches.prompts import asked_in
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import Message
from graftlm.data.sources.load import load_rows
from graftlm.errors import DataError
from graftlm.generation.answer import chat_renderer
from graftlm.generation.engine import Engine
from graftlm.generation.requests import Generation, Request
from graftlm.generation.sampling import Sampling
from graftlm.hub.stopping import all_stop_ids

BATCH = 32
"""Questions that are written and answered at a time: the same ones in every run."""
JUDGES = 32
"""Seeds that the filter's threshold comes from, the first ones."""


@config
class SynthesisConfig:
    """How rows are made. A wrong value raises a ValueError."""

    rows: PositiveCount = 200
    """So many are wanted."""
    tries: PositiveCount = 10
    """At most so many questions are written for each row that is wanted."""
    shots: PositiveCount = 5
    """Seeds in a prompt that asks for a question; all of them where there are no more."""
    question_tokens: PositiveCount = 128
    """The longest question."""
    answer_tokens: PositiveCount = 256
    """The longest answer. One that does not end by then is left out: a model would learn to stop there."""
    temperature: PositiveRate = 1.0
    """Of questions; answers are greedy."""
    filter: Flag = True
    """Leave out answers of which the adapter is less sure than of its answer to any seed."""
    seed: Count = 0


class Seed(NamedTuple):
    """A question of the task, and the system message that it comes with."""

    question: str
    system: str | None = None

    def messages(self) -> list[Message]:
        before = [] if self.system is None else [Message("system", self.system)]
        return [*before, Message("user", self.question)]


class SyntheticRow(NamedTuple):
    """A question with its answer."""

    seed: Seed
    answer: str
    log_prob: float
    """s, in nats a token."""

    def to_fields(self) -> dict[str, Any]:
        messages = [*self.seed.messages(), Message("assistant", self.answer)]
        return {"messages": [{"role": each.role, "content": each.content} for each in messages]}


@dataclass
class Counts:
    """What became of the questions that were written."""

    written: int = 0
    unfinished_questions: int = 0
    unusable_questions: int = 0
    """Empty, with the text of a control token, or with half a character (U+FFFD), which no row may have."""
    repeated_questions: int = 0
    unfinished_answers: int = 0
    unusable_answers: int = 0
    """The same."""
    filtered: int = 0
    kept: int = 0
    threshold: float | None = None
    """The smallest s of the seeds; None without the filter."""
    seeds: int = field(default=0)


def read_seeds(rows: str | Path | None, prompts: Path | None) -> list[Seed]:
    """Questions of a file of rows, the last of each conversation, or the lines of a text file; each once.

    A row of several turns is left out, because a question that follows from others is none by itself. Raises DataError
    where there is no question.
    """
    if prompts is not None:
        try:
            lines = prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{prompts}: cannot be read: {error}", code="unreadable-file") from None
        found = [Seed(line.strip()) for line in lines if line.strip()]
    else:
        found = []
        for row in load_rows(str(rows))[0]:
            asked = asked_in(row)[0]
            system = asked[0].content if asked and asked[0].role == "system" else None
            if len(asked) == 1 + (system is not None) and asked[-1].role == "user":
                found.append(Seed(asked[-1].content, system))
    if not found:
        raise DataError(
            f"{prompts or rows}: holds no question that stands by itself: give rows of one question each, or a text "
            "file with one a line",
            code="no-prompts",
        )
    return list(dict.fromkeys(found))


def synthesize(
    model: Any,
    tokenizer: Any,
    seeds: Sequence[Seed],
    config: SynthesisConfig,
    *,
    adapters: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[SyntheticRow], Counts]:
    """Rows of the task of `adapters`, which are on the model, the same for the same seed; and what was left out.

    `progress` gets how many rows there are, of how many. Raises DataError where the adapter completes no answer to any
    seed within `answer_tokens`, and where no row is left.
    """
    engine = Engine(model, prepack=False)
    writer, answerer = Renderer(tokenizer), chat_renderer(model, tokenizer)
    counts = Counts(seeds=len(seeds))
    known = {seed.question for seed in seeds}
    least = float("-inf")
    if config.filter:
        own = [row.log_prob for row in _answers(engine, answerer, seeds[:JUDGES], config, adapters, Counts())]
        if not own:
            raise DataError(
                f"the adapter completes none of its answers to the seeds within {config.answer_tokens} "
                "tokens: allow longer answers, or give seeds of its task",
                code="no-complete-answers",
            )
        counts.threshold = least = min(own)
    found: list[SyntheticRow] = []
    numbers = range(config.rows * config.tries)
    for first in range(0, len(numbers), BATCH):
        questions = []
        for seed in _questions(engine, writer, seeds, config, numbers[first : first + BATCH], counts):
            if seed.question in known:
                counts.repeated_questions += 1
                continue
            known.add(seed.question)
            questions.append(seed)
        for row in _answers(engine, answerer, questions, config, adapters, counts):
            if row.log_prob < least:
                counts.filtered += 1
            else:
                found.append(row)
        progress(min(len(found), config.rows), config.rows)
        if len(found) >= config.rows:
            break
    if not found:
        raise DataError(
            f"no row is left of {counts.written} questions: {_said(counts)}. Give other seeds or longer answers",
            code="no-rows-left",
        )
    found = found[: config.rows]
    counts.kept = len(found)
    return found, counts


def request_for(seeds: Sequence[Seed]) -> str:
    """The prompt that asks for one more question like these."""
    shown = "\n\n".join(f"Request: {seed.question}" for seed in seeds)
    return (
        f"These are requests of one kind:\n\n{shown}\n\nWrite one more request of the same kind, about something else. "
        "Write the request alone, and nothing before or after it."
    )


def _questions(
    engine: Engine,
    renderer: Renderer,
    seeds: Sequence[Seed],
    config: SynthesisConfig,
    numbers: Sequence[int],
    counts: Counts,
) -> Iterator[Seed]:
    """The questions of these numbers, written by the bare base. Each depends on the seed and its number alone."""
    requests, systems = [], []
    stop_ids = tuple(all_stop_ids(engine.model, renderer.stop_ids))
    for number in numbers:
        draw = random.Random(f"{config.seed}-{number}")  # noqa: S311 (not for secrets)
        shown = draw.sample(list(seeds), min(config.shots, len(seeds)))
        systems.append(shown[0].system)
        ids = renderer.prompt([Message("user", request_for(shown))])
        sampling = Sampling(config.temperature, seed=draw.randrange(2**31))
        requests.append(Request(ids, config.question_tokens, sampling, stop_ids=stop_ids, adapters=(), logprobs=None))
    for generation, system in zip(_run(engine, requests), systems, strict=True):
        counts.written += 1
        if generation.finish != "stop":
            counts.unfinished_questions += 1
            continue
        text = renderer.decode(generation.answer_ids).strip().removeprefix("Request:").strip()
        if not _is_usable(text, renderer):
            counts.unusable_questions += 1
            continue
        yield Seed(text, system)


def _answers(
    engine: Engine,
    renderer: Renderer,
    questions: Sequence[Seed],
    config: SynthesisConfig,
    adapters: Sequence[str],
    counts: Counts,
) -> Iterator[SyntheticRow]:
    """The complete answers with the adapter, each with its s."""
    stop_ids = tuple(all_stop_ids(engine.model, renderer.stop_ids))
    requests = [
        Request(
            renderer.prompt(seed.messages()), config.answer_tokens, stop_ids=stop_ids, adapters=adapters, logprobs=0
        )
        for seed in questions
    ]
    for seed, generation in zip(questions, _run(engine, requests), strict=True):
        if generation.finish != "stop":
            counts.unfinished_answers += 1
            continue
        text = renderer.decode(generation.answer_ids).strip()
        if not _is_usable(text, renderer):
            counts.unusable_answers += 1
            continue
        each = [one.logprob for one in generation.logprobs]
        yield SyntheticRow(seed, text, sum(each) / len(each))


def _is_usable(text: str, renderer: Renderer) -> bool:
    """Whether rows may have this text."""
    control = (*renderer.tokenization.special_texts, *renderer.tokenization.control_texts)
    return bool(text) and "\ufffd" not in text and not any(each in text for each in control)


def _run(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """The generations in the order of their requests; raises what a pass raised."""
    found = dict(engine.run(requests))
    for generation in found.values():
        if generation.error is not None:
            raise generation.error
    return [found[number] for number in range(len(requests))]


def _said(counts: Counts) -> str:
    """What was left out, in a few words."""
    names = {
        "unfinished_questions": "questions did not end",
        "unusable_questions": "questions were empty, or had control tokens or half characters",
        "repeated_questions": "questions were there already",
        "unfinished_answers": "answers did not end",
        "unusable_answers": "answers were so",
        "filtered": "answers were less sure than those to the seeds",
    }
    return ", ".join(f"{count} {text}" for key, text in names.items() if (count := getattr(counts, key)))
