"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from graftlm.generation.logprobs import TokenLogprob
from graftlm.serve.errors import ApiError, invalid
from graftlm.serve.http import respond
from graftlm.serve.limits import read_object
from graftlm.serve.protocol import ChatRequest, read
from graftlm.serve.runs import Run, Service, Wanted
from graftlm.serve.sampling import grammar_of, sampling_of, stops_of
from graftlm.serve.sse import DONE, event
from graftlm.serve.talk import (
    Answer,
    Piece,
    Talk,
    begin,
    collect,
    grammar_for,
    messages_of,
    pieces,
    tools_of,
    variables_of,
)

NO_LOGPROBS: Mapping[str, Any] = {"logprobs": None}


async def handle(service: Service, request: Request) -> Response:
    body = read(ChatRequest, await read_object(request, service.limits))
    talk = talk_of(body)
    return await respond(
        service,
        request,
        lambda: begin(service, talk),
        lambda run: ChatFormat(run, body, talk),
        stream=bool(body.stream),
    )


def talk_of(body: ChatRequest) -> Talk:
    """What a request wants; ApiError for fields that contradict each other."""
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise invalid("max_tokens and max_completion_tokens are one limit, and differ", "max_tokens")
    if body.max_tokens == 0:
        raise invalid("max_tokens is 0, and an answer needs a token", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    tools = tools_of(body.tools)
    parallel = body.parallel_tool_calls is not False
    grammar = grammar_for(grammar_of(body.response_format), body.tool_choice, tools, parallel=parallel)
    offered = () if body.tool_choice == "none" else tools
    wanted = Wanted(
        body.model,
        body.max_completion_tokens or body.max_tokens,
        sampling_of(body),
        body.seed,
        body.n or 1,
        stops_of(body.stop),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar,
        tools=bool(offered),
    )
    variables = variables_of(body.chat_template_kwargs, body.reasoning_effort)
    return Talk(wanted, messages_of(body.messages), offered, variables)


class ChatFormat:
    """Answers in the form of /v1/chat/completions."""

    def __init__(self, run: Run, body: ChatRequest, talk: Talk) -> None:
        self.run, self.body, self.talk = run, body, talk
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": run.tag,
        }
        self.prompt_tokens = sum(map(len, run.prompts))

    async def whole(self) -> dict[str, Any]:
        answers = await collect(self.run, self.talk)
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        usage = usage_of(self.prompt_tokens, sum(len(answer.tokens) for answer in answers))
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.thought:
            message["reasoning_content"] = answer.thought
        if answer.calls:
            message["tool_calls"] = [tool_call(call) for call in answer.calls]
            message["content"] = answer.text or None
        return {"index": number, "message": message, "finish_reason": answer.finish} | self._logprobs(
            answer.tokens, answer.logprobs
        )

    async def events(self) -> AsyncIterator[bytes]:
        count, calls = 0, [0] * self.run.count
        try:
            for number in range(self.run.count):
                yield self._chunk(number, {"role": "assistant", "content": ""})
            async for piece in pieces(self.run, self.talk):
                count += len(piece.tokens)
                delta = self._delta(piece, calls)
                logprobs = self._logprobs(piece.tokens, piece.logprobs)
                if delta or piece.finish or logprobs["logprobs"]:
                    yield self._chunk(piece.number, delta, piece.finish, logprobs)
            if self.body.stream_options is not None and self.body.stream_options.include_usage:
                usage = usage_of(self.prompt_tokens, count)
                yield event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
            yield DONE
        except ApiError as error:
            yield event(error.body("/v1/chat/completions"))

    def _logprobs(self, tokens: Sequence[int], found: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Of all tokens that were generated, those of thoughts and calls and the one that ends the answer too."""
        if not self.body.logprobs or not tokens:
            return {"logprobs": None}
        return {"logprobs": {"content": self.run.opened.rendering.texts.chat(tokens, found), "refusal": None}}

    def _delta(self, piece: Piece, calls: list[int]) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if piece.part.text:
            delta["content"] = piece.part.text
        if piece.part.thought:
            delta["reasoning_content"] = piece.part.thought
        if piece.part.call is not None:
            delta["tool_calls"] = [{"index": calls[piece.number], **tool_call(piece.part.call)}]
            calls[piece.number] += 1
        return delta

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        finish: str | None = None,
        logprobs: Mapping[str, Any] = NO_LOGPROBS,
    ) -> bytes:
        choice = {"index": index, "delta": delta, **logprobs, "finish_reason": finish}
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": [choice]}
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            chunk["usage"] = None
        return event(chunk)


def tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}


def usage_of(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
