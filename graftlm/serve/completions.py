"""POST /v1/completions: a text, or ids, and what follows."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from graftlm.generation.logprobs import TokenLogprob
from graftlm.generation.requests import Ids
from graftlm.serve.catalog import Opened
from graftlm.serve.chat import usage_of
from graftlm.serve.errors import ApiError, invalid
from graftlm.serve.http import respond
from graftlm.serve.limits import read_object
from graftlm.serve.protocol import CompletionRequest, read
from graftlm.serve.runs import Run, Service, Wanted
from graftlm.serve.sampling import grammar_of, sampling_of, stops_of
from graftlm.serve.sse import DONE, event
from graftlm.serve.talk import Answer, collect, pieces

DEFAULT_TOKENS = 16
"""As OpenAI has it for this route."""


async def handle(service: Service, request: Request) -> Response:
    body = read(CompletionRequest, await read_object(request, service.limits))
    _check(body)
    prompts = inputs_of(body.prompt, "prompt")
    length = DEFAULT_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    form = grammar_of(body.response_format)
    wanted = Wanted(
        body.model,
        length,
        sampling_of(body),
        body.seed,
        body.n or 1,
        stops_of(body.stop),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        grammar=None if form is None else lambda _: form,
    )

    def render(opened: Opened) -> list[Ids]:
        return [ids_of(prompt, opened) for prompt in prompts]

    async def begin() -> Run:
        return await service.run(wanted, render, len(prompts))

    return await respond(
        service, request, begin, lambda run: CompletionFormat(run, body, prompts), stream=bool(body.stream)
    )


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise invalid("suffix: text before another text is not supported", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of must be n: answers are not compared", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens is 0, and an answer needs a token; 0 is for echo alone", "max_tokens")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    if body.echo and body.stream:
        raise invalid("echo and stream exclude each other", "echo")


def inputs_of(value: Any, field: str) -> list[str | list[int]]:
    """Texts or lists of ids; one of them may stand alone."""
    if isinstance(value, str) or (value and all(isinstance(one, int) for one in value)):
        value = [value]
    if not value:
        raise invalid(f"{field} is empty", field)
    for one in value:
        if isinstance(one, list) and any(isinstance(token, bool) or token < 0 for token in one):
            raise invalid(f"{field}: ids are whole numbers from 0 on", field)
    return list(value)


def ids_of(prompt: str | list[int], opened: Opened, field: str = "prompt") -> list[int]:
    """The ids of a text, with the tokens that the tokenizer puts around texts by itself; given ids as they are."""
    tokenizer = opened.renderer.tokenizer
    if isinstance(prompt, str):
        return list(map(int, tokenizer(prompt)["input_ids"]))
    size = opened.vocabulary
    if wrong := [token for token in prompt if token >= size]:
        raise invalid(f"{field}: {wrong[0]} is no token of this model, which has the ids 0 to {size - 1}", field)
    return prompt


class CompletionFormat:
    """Answers in the form of /v1/completions."""

    def __init__(self, run: Run, body: CompletionRequest, prompts: Sequence[str | list[int]]) -> None:
        self.run, self.body, self.prompts = run, body, prompts
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": run.tag,
        }
        self.prompt_tokens = sum(map(len, run.prompts))

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        """With `echo` the prompt stands before the answer; with max_tokens 0 it stands alone."""
        body, at = self.body, number // (self.body.n or 1)
        if body.max_tokens == 0:
            answer = Answer(finish="length")
        if not body.echo:
            return _choice(number, answer.text, answer.finish, self._logprobs(answer.tokens, answer.logprobs))
        prompt, ids = self.prompts[at], self.run.prompts[at]
        text = prompt if isinstance(prompt, str) else self.run.opened.renderer.decode(prompt)
        found = [*self.run.generation(number).prompt_logprobs, *answer.logprobs]
        return _choice(number, text + answer.text, answer.finish, self._logprobs([*ids, *answer.tokens], found))

    def _logprobs(self, tokens: Sequence[int], found: Sequence[TokenLogprob | None], offset: int = 0) -> Any:
        if self.body.logprobs is None or not tokens:
            return None
        return self.run.opened.rendering.texts.completion(tokens, found, offset)

    async def whole(self) -> dict[str, Any]:
        answers = await collect(self.run)
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        count = 0 if self.body.max_tokens == 0 else sum(len(answer.tokens) for answer in answers)
        return {**self.head, "choices": choices, "usage": usage_of(self.prompt_tokens, count)}

    async def events(self) -> AsyncIterator[bytes]:
        count, offsets = 0, [0] * self.run.count
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        end, texts = {"usage": None} if with_usage else {}, self.run.opened.rendering.texts
        try:
            async for piece in pieces(self.run):
                count += len(piece.tokens)
                number, text = piece.number, piece.part.text
                logprobs = self._logprobs(piece.tokens, piece.logprobs, offsets[number])
                offsets[number] += sum(len(texts.text_of(token)) for token in piece.tokens)
                if text or piece.finish or logprobs is not None:
                    yield event({**self.head, "choices": [_choice(number, text, piece.finish, logprobs)], **end})
            if with_usage:
                yield event({**self.head, "choices": [], "usage": usage_of(self.prompt_tokens, count)})
            yield DONE
        except ApiError as error:
            yield event(error.body("/v1/completions"))


def _choice(index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish or None}
