"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol, as a translation to and from the chat core."""

import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graftlm.generation.grammar import Grammar
from graftlm.generation.sampling import GREEDY
from graftlm.serve.errors import ApiError, invalid
from graftlm.serve.http import ADAPTER, respond
from graftlm.serve.limits import read_object, unknown_field
from graftlm.serve.protocol import CountRequest, MessagesRequest, read
from graftlm.serve.runs import Run, Service, Wanted
from graftlm.serve.sampling import grammar_of, sampling_of, stops_of
from graftlm.serve.sse import event
from graftlm.serve.talk import Answer, Piece, Talk, begin, collect, grammar_for, messages_of, pieces, text_of, tools_of
from graftlm.serve.tokens import with_opened

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
"""OpenAI's word for the end of an answer -> Anthropic's."""

Tree = dict[str, Any]


async def handle(service: Service, request: Request) -> Response:
    body = read(MessagesRequest, await read_object(request, service.limits))
    talk = talk_of(body)
    wanted = replace(
        talk.wanted,
        max_tokens=body.max_tokens,
        sampling=sampling_of(body),
        stop=stops_of(body.stop_sequences, "stop_sequences"),
    )
    talk = replace(talk, wanted=wanted)
    return await respond(
        service,
        request,
        lambda: begin(service, talk),
        lambda run: MessagesFormat(run, body, talk),
        stream=bool(body.stream),
    )


async def count_tokens(service: Service, request: Request) -> Response:
    body = read(CountRequest, await read_object(request, service.limits))
    talk = talk_of(body)
    service.enter(1)
    work = partial(with_opened, service, body.model, lambda opened: len(talk.render(opened)[0]))
    count, tag = await service.in_thread(work, leave=1)
    return JSONResponse({"input_tokens": count}, headers={ADAPTER: tag})


def talk_of(body: CountRequest) -> Talk:
    """The request as the chat core has it."""
    system = text_of(body.system, "system", part="block") if body.system else ""
    trees: list[Tree] = [{"role": "system", "content": system}] if system else []
    for number, message in enumerate(body.messages):
        trees += _message(message, f"messages[{number}]")
    tools = tools_of([_tool(tool, number) for number, tool in enumerate(body.tools or [])])
    thinking = (body.thinking or {}).get("type")
    variables = {} if thinking is None else {"enable_thinking": thinking != "disabled"}
    choice = (body.tool_choice or {}).get("type", "auto")
    if not isinstance(choice, str):
        raise invalid(f"tool_choice.type must be a text, this is {choice!r:.60}", "tool_choice")
    named = {"any": "required", "tool": body.tool_choice}
    parallel = not (body.tool_choice or {}).get("disable_parallel_tool_use")
    grammar = grammar_for(
        _format(body.output_config), named.get(choice, choice), tools, field="output_config", parallel=parallel
    )
    offered = () if choice == "none" else tools
    wanted = Wanted(body.model, None, GREEDY, grammar=grammar, tools=bool(offered))
    return Talk(wanted, messages_of(trees), offered, optional_variables=variables)


def _format(config: Tree | None) -> Grammar | None:
    """What `output_config` wants an answer to be."""
    if unknown := [key for key in config or {} if key not in ("format", "effort")]:
        raise unknown_field(unknown[0], ("format",), "output_config.")
    if config and config.get("effort") is not None:
        raise invalid("output_config.effort is not supported", "output_config")
    return grammar_of((config or {}).get("format"), "output_config.format")


def _tool(tool: Tree, number: int) -> Tree:
    if tool.get("type", "custom") != "custom":
        raise invalid(f"tools[{number}]: {tool['type']!r:.60} is a tool of Anthropic's servers", "tools")
    described = {"description": tool["description"]} if tool.get("description") else {}
    function = {"name": tool.get("name"), **described, "parameters": tool.get("input_schema", {})}
    return {"type": "function", "function": function}


def _message(message: Mapping[str, Any], where: str) -> list[Tree]:
    """One message as the messages that OpenAI has for it: results of tools are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise invalid(f"{where}.role must be user or assistant, this is {role!r:.60}", "messages")
    if not isinstance(content, list):
        return [{"role": role, "content": text_of(content, f"{where}.content", part="block")}]
    return _user(content, where) if role == "user" else [_assistant(content, where)]


def _user(content: Sequence[Any], where: str) -> list[Tree]:
    found: list[Tree] = []
    for block in content:
        if isinstance(block, Mapping) and block.get("type") == "tool_result":
            text = text_of(block.get("content") or "", f"{where}.content", part="block")
            found.append({"role": "tool", "content": text, "tool_call_id": block.get("tool_use_id")})
        elif found and found[-1]["role"] == "user":
            found[-1]["content"] += text_of([block], f"{where}.content", part="block")
        else:
            found.append({"role": "user", "content": text_of([block], f"{where}.content", part="block")})
    if not found:
        raise invalid(f"{where}.content is empty", "messages")
    return found


def _assistant(content: Sequence[Any], where: str) -> Tree:
    text, thoughts, calls = "", "", list[Tree]()
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "thinking":
            thoughts += str(block.get("thinking") or "")
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        else:
            text += text_of([block], f"{where}.content", part="block")
    return {"role": "assistant", "content": text, "reasoning_content": thoughts, "tool_calls": calls}


class MessagesFormat:
    """Answers in the form of /v1/messages."""

    def __init__(self, run: Run, body: MessagesRequest, talk: Talk) -> None:
        self.run, self.body, self.talk = run, body, talk
        self.id = f"msg_{secrets.token_hex(12)}"
        self.prompt_tokens = sum(map(len, run.prompts))

    def _message(self, content: list[Tree], finish: str | None, stopped: str | None, tokens: int) -> Tree:
        usage = {"input_tokens": self.prompt_tokens, "output_tokens": tokens}
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.body.model,
            "content": content,
            **_end(finish, stopped),
            "usage": usage,
        }

    async def whole(self) -> Tree:
        (answer,) = await collect(self.run, self.talk)
        return self._message(_blocks(answer), answer.finish, answer.stopped, len(answer.tokens))

    async def events(self) -> AsyncIterator[bytes]:
        blocks, count = _Blocks(), 0
        try:
            yield _event({"type": "message_start", "message": self._message([], None, None, 0)})
            async for piece in pieces(self.run, self.talk):
                count += len(piece.tokens)
                for each in blocks.take(piece):
                    yield _event(each)
                if piece.finish is not None:
                    for each in blocks.end():
                        yield _event(each)
                    end = {"delta": _end(piece.finish, piece.stopped), "usage": {"output_tokens": count}}
                    yield _event({"type": "message_delta", **end})
            yield _event({"type": "message_stop"})
        except ApiError as error:
            yield _event(error.body("/v1/messages"))


def _event(data: Tree) -> bytes:
    return event(data, data["type"])


def _end(finish: str | None, stopped: str | None) -> Tree:
    if stopped is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stopped}
    return {"stop_reason": finish and REASONS[finish], "stop_sequence": None}


def _blocks(answer: Answer) -> list[Tree]:
    thoughts = [{"type": "thinking", "thinking": answer.thought, "signature": ""}] if answer.thought else []
    text = [{"type": "text", "text": answer.text}] if answer.text or not answer.calls else []
    return [*thoughts, *text, *(_use(call, json.loads(call["arguments"])) for call in answer.calls)]


def _use(call: Mapping[str, Any], given: Any) -> Tree:
    return {"type": "tool_use", "id": call["id"], "name": call["name"], "input": given}


class _Blocks:
    """The blocks of a streamed message: one is open at a time."""

    def __init__(self) -> None:
        self.number, self.open = -1, ""

    def take(self, piece: Piece) -> list[Tree]:
        found: list[Tree] = []
        if piece.part.thought:
            found += self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            found.append(self._delta({"type": "thinking_delta", "thinking": piece.part.thought}))
        if piece.part.text:
            found += self._begin("text", {"type": "text", "text": ""})
            found.append(self._delta({"type": "text_delta", "text": piece.part.text}))
        if piece.part.call is not None:
            found += [*self.end(), *self._begin("tool_use", _use(piece.part.call, {}))]
            found.append(self._delta({"type": "input_json_delta", "partial_json": piece.part.call["arguments"]}))
        return found

    def _begin(self, kind: str, block: Tree) -> list[Tree]:
        if self.open == kind:
            return []
        ended = self.end()
        self.number, self.open = self.number + 1, kind
        return [*ended, {"type": "content_block_start", "index": self.number, "content_block": block}]

    def _delta(self, delta: Tree) -> Tree:
        return {"type": "content_block_delta", "index": self.number, "delta": delta}

    def end(self) -> list[Tree]:
        ended = [{"type": "content_block_stop", "index": self.number}] if self.open else []
        self.open = ""
        return ended
